"""The command line, `python -m rgd_ext COMMAND`.

A command is a module or a package with a function `add(commands)`, which declares its arguments and names the function
that runs it. That function imports matplotlib, rich, scikit-learn and scipy, so that nothing else needs them. Add a new
command to `COMMANDS` in `main`.
"""
