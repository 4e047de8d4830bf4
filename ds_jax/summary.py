"""A table of a model's sub-networks: slices, MAdds, parameters.

python -m ds_jax.summary ds_mobilenet --image_size=224
"""

import argparse
import json

from ds_jax import models


def rows(model, image_size: int) -> list[dict]:
  """Returns one row a sub-network, the widest last."""
  table = []
  for subnet in model.sub_networks:
    cost = model.cost(subnet, image_size)
    table.append(
      {
        'index': subnet.index,
        'slices': [str(s) for s in (subnet.stem, *subnet.stages)],
        'madds': cost.madds,
        'params': cost.params,
      }
    )
  return table


def main(argv: list[str] | None = None) -> None:
  """Prints the table."""
  parser = argparse.ArgumentParser(
    prog='python -m ds_jax.summary', description=__doc__.splitlines()[0]
  )
  parser.add_argument('model', choices=models.list_models())
  parser.add_argument('--image_size', type=int, help='pixels a side')
  parser.add_argument('--num_classes', type=int, default=1000)
  parser.add_argument('--json', action='store_true')
  arguments = parser.parse_args(argv)
  image_size = arguments.image_size or models.image_size(arguments.model)
  model = models.create_abstract_model(
    arguments.model,
    num_classes=arguments.num_classes,
    **models.size_options(arguments.model, image_size),
  )
  table = rows(model, image_size)
  if arguments.json:
    print(json.dumps(table, indent=2))
    return
  print(
    f'{arguments.model}, {image_size} pixels, {arguments.num_classes} classes'
  )
  print(f'{"index":>5} {"MAdds":>15} {"parameters":>12}  stem and stages')
  for row in table:
    slices = ' | '.join(row['slices'])
    print(
      f'{row["index"]:>5} {row["madds"]:>15,} {row["params"]:>12,}  {slices}'
    )


if __name__ == '__main__':
  main()
