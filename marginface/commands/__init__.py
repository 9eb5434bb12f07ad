"""One thin module for each subcommand of `marginface`; __main__ lists them."""
