"""`python -m invguide` is the command `invguide`."""

from invguide.cli.commands import main

if __name__ == "__main__":
    main()
