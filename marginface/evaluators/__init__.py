"""What a trained network is worth: a module of each kind of evaluator, with a class `Evaluator`.

    Evaluator(subject, *, ...)   what is measured and on what, see common.Subject; its own settings
    run(state)                   yields (name, value), the names "<subject.name>/<figure>"
    pictures(folder)             if it has any: draws the last state into a folder that is there and
                                 yields each common.Picture, which the run's page shows
    arrays()                     if it has any: {name: array} of the last state, which is saved in
                                 the run folder as <name>.npy

config.evals names them, each with its test set and its interval.
"""
