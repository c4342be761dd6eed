"""python -m portable_mla.cli"""

from portable_mla.cli import main

main()
