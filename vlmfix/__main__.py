"""`python -m vlmfix` is the command line; `accelerate launch -m vlmfix` needs this form."""

from vlmfix.cli.main import main

if __name__ == "__main__":
    main()
