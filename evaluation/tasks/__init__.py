"""One module per task, each with `TASK`; modules with a leading underscore are shared material."""
