"""Results files -> a leaderboard: as a page, a text, a LaTeX table, data or figures.

The way of the data, and the modules that do each step:

    results files -> cells    `result_files`, `results_schema`, `parsing`, `cell`: what each file says; with
                              `metric_values`, `averages` and `speeds`: which of its numbers are figures
    cells -> rows             `rows`: which of several files of one setting counts
    rows -> tables            `tables`, `metrics`, `differences` (with `samples` and `bootstrap`): runs that may be
                              compared, with their differences to the baseline
    tables -> contents        `build`, with `columns`, `formatting`, `marks`, `notices`, `loss_curves` and `ranking`:
                              everything that is printed, computed once
    contents -> output        the writers `markdown`, `latex`, `html`, `data_files` and `figures`, with the templates
                              in `assets`; `command` picks them

Reads what lm-eval 0.4 writes, with or without the facts that our models add. Of this package it imports the bootstrap
alone, and neither torch nor lm-eval, so that results can be compared on any machine.
"""
