"""Claims of the field, tried at small scale: each a short file that a reader can change.

Each has `run(subject, out, say)`, which writes results.json, table.md and pictures to the folder
`out`. subject: for how many seconds to train, or for those in `commands.ON_A_RUN` the folder of a
trained run. `cli.EXPERIMENTS` lists them all.
"""
