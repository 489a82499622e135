"""A bank knows its model in every data type and weight format, knows it from others, and each check is forced by its own name."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from safesteer.errors import BankError, FingerprintMismatchError
from safesteer.models import Fingerprint, LoadedModel, fingerprint, load_model
from safesteer.models.files import model_files
from safesteer.models.fingerprint import CHECKS
from tests.tiny import ARCHITECTURES, bank_for, make, tokenizer

TYPES = (torch.float32, torch.float16, torch.bfloat16)
BLOCK = 32  # rows and columns that one scale of FP8 stands for


def seeded(architecture: str, seed: int) -> LoadedModel:
    """A tiny model with weights as small as a real one's, so that some are subnormal in float16."""
    made = make(architecture)
    torch.manual_seed(seed)
    for parameter in made.model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.02)
    return made


def cast(loaded: LoadedModel, dtype: torch.dtype) -> LoadedModel:
    return LoadedModel.wrap(copy.deepcopy(loaded.model).to(dtype), loaded.tokenizer)


def saved(loaded: LoadedModel, folder: Path, dtype: torch.dtype = torch.bfloat16) -> Path:
    copy.deepcopy(loaded.model).to(dtype).save_pretrained(folder)
    loaded.tokenizer.save_pretrained(folder)
    return folder


def quantized(source: Path, folder: Path, how: str) -> Path:
    """The checkpoint in `source` with the matrices of its blocks in FP8, or packed to four bits as compressed-tensors does."""
    weights: dict[str, torch.Tensor] = {}
    for name, value in load_file(source / "model.safetensors").items():
        if ".layers." not in name or value.dim() != 2:
            weights[name] = value
        elif how == "fp8":
            rows, columns = (-(-size // BLOCK) for size in value.shape)
            padded = torch.nn.functional.pad(
                value.float(), (0, columns * BLOCK - value.shape[1], 0, rows * BLOCK - value.shape[0])
            )
            blocks = padded.reshape(rows, BLOCK, columns, BLOCK)
            scale = blocks.abs().amax(dim=(1, 3)) / 448
            whole = (blocks / scale[:, None, :, None]).reshape(padded.shape)[: value.shape[0], : value.shape[1]]
            weights[name] = whole.to(torch.float8_e4m3fn).contiguous()
            weights[f"{name}_scale_inv"] = scale
        else:
            scale = value.float().abs().amax(dim=1, keepdim=True) / 7
            steps = (value.float() / scale).round().clamp(-8, 7).to(torch.int64) + 8
            shifts = 4 * torch.arange(8)
            packed = (steps.reshape(len(steps), -1, 8) << shifts).sum(dim=-1)
            packed = torch.where(packed >= 2**31, packed - 2**32, packed)
            weights[f"{name}_packed"] = packed.to(torch.int32)
            weights[f"{name}_scale"] = scale.to(value.dtype)
            weights[f"{name}_shape"] = torch.tensor(value.shape)
    folder.mkdir()
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((source / "config.json").read_text())
    scheme = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "channel"}
    config["quantization_config"] = {
        "fp8": {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [BLOCK, BLOCK]},
        "packed": {
            "quant_method": "compressed-tensors",
            "format": "pack-quantized",
            "quantization_status": "compressed",
            "ignore": ["lm_head"],
            "config_groups": {"group_0": {"targets": ["Linear"], "weights": scheme, "input_activations": None}},
        },
    }[how]
    (folder / "config.json").write_text(json.dumps(config))
    tokenizer().save_pretrained(folder)
    return folder


def tuned(loaded: LoadedModel, share: float, what: str = "q_proj") -> LoadedModel:
    """A fine-tune: the matrices whose name holds `what` moved by `share` of their length."""
    other = copy.deepcopy(loaded.model)
    torch.manual_seed(9)
    with torch.no_grad():
        for name, parameter in other.named_parameters():
            if what in name and parameter.dim() > 1:
                noise = torch.randn_like(parameter)
                parameter += share * noise * parameter.norm() / noise.norm()
    return LoadedModel.wrap(other, loaded.tokenizer)


def test_of_45_models_none_is_refused_by_itself_in_any_type_and_all_by_any_other() -> None:
    for architecture in ARCHITECTURES:
        found: list[list[Fingerprint]] = []
        for seed in range(3):
            model = seeded(architecture, seed)
            found.append([fingerprint(cast(model, dtype)) for dtype in TYPES])
            assert {one.dtype for one in found[-1]} == {"float32", "float16", "bfloat16"}
        for mine, bank in product(range(3), range(3)):
            for theirs, other in product(range(3), range(3)):
                if mine == theirs:
                    assert found[mine][bank].differences(found[theirs][other]) == {}
                elif bank == other:
                    assert set(found[mine][bank].differences(found[theirs][-bank])) == {"weights"}


def test_types_that_come_from_one_another_agree() -> None:
    """A checkpoint in one type, a bank made in a second, applied in a third; and weights that two machines dequantised."""
    model = seeded("llama", 1)
    for stored in TYPES:
        checkpoint = cast(model, stored)
        for fitted in TYPES:
            bank = fingerprint(cast(checkpoint, fitted))
            for applied in TYPES:
                assert bank.differences(fingerprint(cast(checkpoint, applied))) == {}
    noisy = copy.deepcopy(model.model)
    with torch.no_grad():
        for parameter in noisy.parameters():
            parameter += 2.0**-20 * parameter.abs().mean() * torch.randn_like(parameter)
    assert fingerprint(model).differences(fingerprint(LoadedModel.wrap(noisy, model.tokenizer))) == {}


@pytest.mark.parametrize("dtype", TYPES)
def test_a_fine_tune_is_known_from_its_base(dtype: torch.dtype) -> None:
    model = seeded("llama", 2)
    bank = fingerprint(cast(model, dtype))
    for what, share in (("q_proj", 0.02), ("layers", 0.01), ("embed", 0.02)):
        said = bank.differences(fingerprint(cast(tuned(model, share, what), dtype)))
        assert set(said) == {"weights"}
        assert "a fine-tune, or the same quantised" in said["weights"]
    assert "fine-tune" not in bank.differences(fingerprint(seeded("llama", 3)))["weights"]


@pytest.mark.parametrize("how", ["fp8", "packed"])
def test_a_bank_knows_its_model_quantised(how: str, tmp_path: Path) -> None:
    """Both ways round, from files and (FP8, which transformers dequantises on a CPU) loaded; others are refused."""
    model = seeded("llama", 4)
    dense = saved(model, tmp_path / "dense")
    bank = bank_for(load_model(str(dense)))
    small = quantized(dense, tmp_path / "small", how)
    stranger = quantized(saved(seeded("llama", 5), tmp_path / "other"), tmp_path / "stranger", how)
    tune = quantized(saved(tuned(model, 0.02, "embed"), tmp_path / "tuned"), tmp_path / "tune", how)
    bank.check(model_files(str(small)).fingerprint(bank.model.weights))
    own = model_files(str(small)).fingerprint()
    assert own.differences(bank.model) == bank.model.differences(own) == {}
    for other in (stranger, tune):
        with pytest.raises(FingerprintMismatchError, match="weights"):
            bank.check(model_files(str(other)).fingerprint(bank.model.weights))
        assert set(own.differences(model_files(str(other)).fingerprint())) == {"weights"}
    if how == "packed":
        pytest.importorskip("compressed_tensors")
    loaded = load_model(str(small))
    assert loaded.quantized
    bank.check(loaded)
    made = replace(bank, model=fingerprint(loaded))
    made.check(load_model(str(dense)))
    made.check(own)
    with pytest.raises(FingerprintMismatchError, match="weights"):
        bank.check(load_model(str(stranger)))


def test_norms_that_a_quantiser_scaled_do_not_hide_the_model(tmp_path: Path) -> None:
    """AWQ and SmoothQuant move scales from a block's matrices into the norm before them."""
    model = seeded("llama", 6)
    bank = bank_for(model)
    smoothed = copy.deepcopy(model.model)
    with torch.no_grad():
        for layer in smoothed.model.layers:
            layer.input_layernorm.weight /= 1.7
    smoothed.config.quantization_config = {"quant_method": "awq", "bits": 4}
    bank.check(LoadedModel.wrap(smoothed, model.tokenizer))
    del smoothed.config.quantization_config
    with pytest.raises(FingerprintMismatchError, match="weights"):
        bank.check(LoadedModel.wrap(smoothed, model.tokenizer))


def test_a_bank_that_holds_raw_fp8_values_still_knows_its_model(tmp_path: Path) -> None:
    """What earlier versions wrote for a model in FP8: values without their scales."""
    dense = saved(seeded("llama", 7), tmp_path / "dense")
    bank = bank_for(load_model(str(dense)))
    name = "model.layers.1.self_attn.q_proj.weight"
    old = replace(bank, model=replace(bank.model, weights={**bank.model.weights, name: (3.0,) * 32}))
    old.check(model_files(str(quantized(dense, tmp_path / "small", "fp8"))).fingerprint(old.model.weights))


def variants(loaded: LoadedModel) -> dict[str, LoadedModel]:
    """One model for each check, which differs from `loaded` in that alone."""
    other_template = copy.deepcopy(loaded.tokenizer)
    other_template.chat_template += " "
    wider = copy.deepcopy(loaded.model)
    wider.config.vocab_size += 1
    named = type("Renamed", (type(loaded.model),), {})
    renamed = copy.deepcopy(loaded.model)
    renamed.__class__ = named
    return {
        "template": replace(loaded, tokenizer=other_template),
        "vocabulary": replace(loaded, model=wider),
        "architecture": replace(loaded, model=renamed),
        "weights": tuned(loaded, 0.05, "layers"),
    }


def test_each_check_is_forced_by_its_own_name_and_no_other() -> None:
    model = seeded("llama", 8)
    bank = bank_for(model)
    for check, other in variants(model).items():
        with pytest.raises(FingerprintMismatchError, match=rf"with --force {check} \(force=\['{check}'\]\)"):
            bank.check(other)
        with pytest.raises(FingerprintMismatchError):
            bank.check(other, [one for one in CHECKS if one != check])
        bank.check(other, [check])
    both = replace(variants(model)["weights"], tokenizer=variants(model)["template"].tokenizer)
    with pytest.raises(FingerprintMismatchError, match="chat template") as caught:
        bank.check(both, ["weights"])
    assert "weights" not in str(caught.value)
    bank.check(both, ["weights", "template"])


def test_widths_and_depths_are_never_forced_and_names_must_be_known() -> None:
    bank = bank_for(seeded("llama", 8))
    for changes, what in (({"hidden_size": 64}, "width"), ({"num_hidden_layers": 4}, "number of layers")):
        with pytest.raises(FingerprintMismatchError, match=what) as caught:
            bank.check(make("llama", **changes), CHECKS)
        assert "--force" not in str(caught.value)
    unknown: Any
    for unknown in (True, "weights", ["widths"]):
        with pytest.raises(BankError, match="architecture, vocabulary, template, weights"):
            bank.check(seeded("llama", 8), unknown)
