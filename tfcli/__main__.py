"""``python -m tfcli``."""

from tfcli.cli.main import run

if __name__ == "__main__":
    run()
