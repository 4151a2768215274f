"""Evaluate a net on every subset of the modalities that a case has.

    python docs/examples/evaluate_subsets.py

A case is read once for all its subsets, and PrismNet encodes each window once.
"""

# %% Two phantoms: the first is complete, the second has only flair and t1
import tempfile

import prism_meta as pm
from prism_meta.data.phantom import write_phantoms

folder = tempfile.mkdtemp()
write_phantoms(folder, pm.subsets(4)[[14, 5]], shape=(40, 48, 36), spacing=4.0)
cases = pm.load_cases(folder)

# %% 15 + 3 subsets, three regions each: Dice, and HD95 in mm
net = pm.PrismNet(spatial_dims=2, width=4).eval()
records = pm.evaluate(net, cases, preprocessing=pm.Preprocessing((4.0, 4.0, 4.0)), patch=(32, 32))
print(len(records), records[0])
