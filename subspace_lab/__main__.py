"""`python -m subspace_lab`: the same as the command `subspace-lab`."""

from subspace_lab.cli import main

if __name__ == "__main__":
    main()
