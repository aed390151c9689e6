"""`python -m regraft.serve BUNDLE`: the serve command by itself."""

from __future__ import annotations

import argparse

from regraft.serve.command import add_arguments, serve

if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m regraft.serve", description="Answer HTTP requests with a bundle.")
    add_arguments(parser)
    try:
        raise SystemExit(serve(parser.parse_args()))
    except KeyboardInterrupt:
        raise SystemExit(130) from None
