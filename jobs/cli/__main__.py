"""``python -m jobs.cli``: the ``pgscribe`` command of this very Python."""

from jobs.cli import main

if __name__ == "__main__":
    main(prog_name="pgscribe")
