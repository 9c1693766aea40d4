"""`python -m zipper_ad` is the same as `zipper_ad`."""

import sys

from zipper_ad.cli import main

if __name__ == "__main__":
    sys.exit(main())
