"""`python -m common.tiny` builds the tiny world; see the package's docstring."""

from common.tiny.build import main

if __name__ == "__main__":
    main()
