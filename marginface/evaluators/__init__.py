"""What a trained network is worth: a module of each kind of evaluator, with a class `Evaluator`.

    Evaluator(subject, *, ...)   what is measured and on what, see common.Subject; its own settings
    run(state)                   yields (name, value), the names "<subject.name>/<figure>"
    report(folder)               if it has any: leaves pictures and arrays of the last state that
                                 was measured in a run folder, and yields each style.Picture

config.evals names them, each with its test set and its interval.
"""
