"""One file per experiment: get_config(arg) says what runs, sweep(add, arg) what varies."""
