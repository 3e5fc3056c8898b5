"""A job of torchrun whose nodes have folders of their own, under the same path, and lose a node."""

import filecmp
import re

import pytest

from tests.cluster.test_nodes import ELASTIC, ElasticJob
from tests.integration.runs import options


@pytest.mark.long
def test_job_continues_from_a_copy_when_the_node_of_process_0_is_lost(
    make_nodes, betons, tmp_path, train
):
    """The node returns with an earlier state, and gets the run's again."""
    run, more = tmp_path / "run", {**ELASTIC, "training.epochs": 4}
    run.mkdir()
    nodes = make_nodes(4, private=[run])
    job = ElasticJob(nodes, tmp_path, options(betons, run, **more))
    job.trace.hold_at(4)
    job.wait_until_held()
    own = [node.private(run) for node in job.nodes]
    job.wait_until(lambda: all((folder / "checkpoint_000000003.pt").exists() for folder in own))
    job.cut(job.nodes[0], "power")
    job.trace.hold_at(7)
    job.wait_until_held(job.nodes[0], step=7)
    job.bring_back(job.nodes[0])
    job.wait_until_held(step=7)
    job.trace.hold_at(100)
    assert job.wait() == [0, 0, 0], job.text()
    assert not list(run.iterdir()), "the nodes have used the folder that they share"
    # For the node that returns, torchrun ends the others with a signal, after which they save.
    resumed = sorted(map(int, re.findall(r"resuming .* after step (\d+) of 12", job.text())))
    assert resumed[0] == 3 and 6 < resumed[1] < 12, resumed
    lives = [row["life"] for row in job.trace.steps()]
    assert [life[-1] for life in dict.fromkeys(lives)] == ["3", "2", "3"], lives
    statuses, _, err = train(options(betons, tmp_path / "whole", **more), 3).wait()
    assert statuses == [0] * 3, err
    (first,) = [folder for folder in own if (folder / "final_weights.pt").exists()]
    job.assert_equal(first, tmp_path / "whole", more["training.epochs"])
    names = sorted(path.name for path in first.glob("checkpoint_*.pt")) + ["best.pt"]
    for folder in own:
        assert filecmp.cmpfiles(folder, first, names, shallow=False)[1:] == ([], []), folder
