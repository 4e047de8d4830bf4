"""Measures how fast a model really is on this machine.

python -m ds_jax.benchmark --model=ds_mobilenet --json=benchmark.json
python -m ds_jax.benchmark --workdir=runs/fashion --batch_sizes=1,64
"""

from ds_jax.benchmark import command

if __name__ == '__main__':
  command.main()
