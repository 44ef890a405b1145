"`python -m audiorepro` is the command `audiorepro`"
import sys

from audiorepro.cli import main

if __name__ == '__main__': sys.exit(main())
