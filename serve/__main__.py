"""`python -m serve`: see serve/command.py."""

from serve.command import main

if __name__ == "__main__":
    main()
