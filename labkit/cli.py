"""The command line: `labkit methods · fetch`."""

from __future__ import annotations

import argparse
import sys


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="labkit", description="The LLM compression lab.")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("methods", help="list every technique and its knobs")
    fetch = commands.add_parser("fetch", help="get the model and other assets, checked and resumable")
    fetch.add_argument("asset", nargs="*", help="names from data/manifest.toml; all of them by default")
    args = parser.parse_args(argv)
    if args.command == "methods":
        import labkit

        for name, method in labkit.methods().items():
            print(f"{name}: {method.summary()}")
            for spec in method.knobs().values():
                print(f"  {spec.name} = {spec.default!r}: {spec.help} Allowed: {spec.allowed}.")
        return 0
    from labkit import assets, embedded

    try:
        for name in args.asset or assets.assets():
            print(f"{name}: {assets.fetch(name)}")
        print(f"model: {embedded.folder()}")
    except assets.AssetError as error:
        print(f"labkit: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
