"""`python -m workbench.cli`, where the command itself is not on the path."""

from workbench.cli import app

__all__: list[str] = []

if __name__ == "__main__":
    app(prog_name="workbench")
