"""``python -m clipdistill``, so that ``torchrun -m clipdistill`` works."""

from clipdistill.cli import main

if __name__ == "__main__":
    main()
