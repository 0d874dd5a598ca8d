"""`python -m ppl_lm` is `ppl-lm`."""

from ppl_lm.cli.app import main

if __name__ == "__main__":
    main()
