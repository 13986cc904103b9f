"""Benchmarks, each of which compares its results with float64 before it times anything. `python -m bench --help`.

kernels.py, steps.py, ...   a command each: `python -m bench kernels`
measuring/                  clocks, memory, agreement with float64, tables, records and plots
gradients/                  cases and arms of `kernels`: per-sample gradients, and ways to compute on them
training/                   models and arms of the commands that time training steps
fitting/                    problems and methods of `fit`: least squares
simulating/                 links, models and schedules of `cluster`: predicted steps on many ranks
comparing/                  cases and packages of `compare`: per-sample gradients of other packages
distributing/               processes, arms and clocks of `distributed`
studying/                   questions, methods and figures of `study`
tabulating/                 tables of the documentation, from records: `tables`
gpu/                        checks of the operators and of the machine code on a GPU, which time nothing
gpu_check.sh                everything that is to be run on a GPU, in one call
results/                    raw samples, by machine
"""
