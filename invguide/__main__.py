"""`python -m invguide` is the command `invguide`."""

from invguide.cli import main

if __name__ == "__main__":
    main()
