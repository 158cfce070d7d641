"""``python -m qwen3core``: the command, from a checkout that is not installed."""

from .commands import main

raise SystemExit(main())
