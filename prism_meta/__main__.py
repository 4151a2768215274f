"""``python -m prism_meta``: the command line, where its script is not on the path."""

from prism_meta.cli.commands import main

if __name__ == "__main__":
    main()
