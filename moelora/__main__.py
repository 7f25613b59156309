"""`python -m moelora` is the `moelora` command."""

from .cli import main

raise SystemExit(main())
