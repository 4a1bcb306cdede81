"""`rpb finetune` for launchers: accelerate launch scripts/finetune.py RETROFIT OUT [--recipe FILE]"""

from __future__ import annotations

import sys

from rpb_retrofit.cli import main

if __name__ == "__main__":
    sys.argv.insert(1, "finetune")
    main()
