"""`python -m ds_jax.convert`."""

from ds_jax.convert import command

command.main()
