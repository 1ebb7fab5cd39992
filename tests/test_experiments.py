"The experiment notebooks run headless, from any folder, with their quick parameters; a second run repeats nothing."
import json
from pathlib import Path

import papermill as pm
import pytest

nbs = Path(__file__).resolve().parent.parent/'nbs'


@pytest.mark.timeout(900)
def test_quickstart(tmp_path):
    parameters = dict(preset='quick_emoji', out_dir=str(tmp_path/'out'), seeds=2, processes=2)
    for _ in range(2):
        pm.execute_notebook(nbs/'quickstart.ipynb', tmp_path/'out.ipynb', parameters, kernel_name='python3', cwd=tmp_path, progress_bar=False)
    results = json.loads((tmp_path/'out/results.json').read_text())
    assert set(results['top1']) == {'category', 'action'} and all(len(m['values']) == 2 for p in results['top1'].values() for m in p.values())
    assert len((tmp_path/'out/pretrain/metrics.jsonl').read_text().splitlines()) == results['pretraining']['steps'] / 2   # logged once, not twice
    assert len(json.loads((tmp_path/'out/pretrain/environment.json').read_text())) == 1   # started once
