"""`python -m peftcli`, and what `accelerate launch -m peftcli` starts in every process."""

from peftcli.cli.main import main

if __name__ == "__main__":
    raise SystemExit(main())
