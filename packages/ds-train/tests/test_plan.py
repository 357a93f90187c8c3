"""Plans against closed forms, a measured step, the paper and other people's runs."""

import json
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from ds_model import ModelConfig, parameter_counts
from ds_train.cli import app
from ds_train.errors import TrainConfigError
from ds_train.parallel import Costs, Timetable, make_schedule
from ds_train.plan import (
    CLUSTERS,
    PUBLISHED,
    Cluster,
    PlanError,
    Recipe,
    compare,
    make_plan,
    measure_cluster,
    read_cluster,
    search,
)
from ds_train.plan.cluster import as_toml
from ds_train.plan.work import TokenWork, _distinct

V3 = ModelConfig.preset("v3-671b")
PAPER = PUBLISHED[0]
EVEN = Cluster(  # where everything but products costs next to nothing
    name="even",
    memory=1e6,
    products={"bfloat16": 100.0},
    attention=1e9,
    attention_backward=1e9,
    bandwidth=1e12,
    near=1e12,
    far=1e12,
)


def test_the_papers_own_run_fits_and_takes_what_the_paper_says():
    plan = make_plan(PAPER.config, CLUSTERS["h800"], PAPER.recipe)
    assert PAPER.recipe.dp == 2
    assert PAPER.recipe.micro_batches == 120
    assert plan.fits
    assert plan.device_hours(14.8e12) == pytest.approx(2.664e6, rel=0.03)
    assert plan.price(14.8e12) == pytest.approx(5.328e6, rel=0.03)
    assert plan.days(1e12) == pytest.approx(3.7, rel=0.03)  # "less than two months" in all


def test_other_peoples_runs_are_predicted():
    for run, plan, error in compare():
        assert abs(error) < (0.03 if run.fitted else 0.35), (run.name, error)
        assert plan.recipe.devices == run.recipe.devices


def test_parameters_and_flops_are_the_models():
    recipe = Recipe(devices=1, batch=1, sequence=4096)
    plan = make_plan(V3, EVEN, recipe)
    counts = parameter_counts(V3)
    assert plan.parameters == counts.main + counts.router_bias + counts.mtp
    plain = make_plan(V3.replace(num_nextn_predict_layers=0), EVEN, recipe)
    heads, width, layers = 128, 128 + 64 + 128, 61
    core = 3 * 2 * heads * width * 4096 / 2 * layers
    assert plain.flops == pytest.approx(6 * counts.active + core, rel=1e-3)


def test_without_exchange_a_step_is_its_products_and_the_bubble():
    config = ModelConfig.preset("bench").replace(first_k_dense_replace=0)
    recipe = Recipe(devices=1, batch=8, sequence=256)
    alone = make_plan(config, EVEN, recipe)
    products = alone.flops - 3 * 2 * 8 * (96 + 64) * 128 * 8  # without attention's core
    assert alone.seconds["computing"] == pytest.approx(8 * 256 * products / 100e12, rel=1e-3)
    assert alone.seconds["idle in the pipeline"] == 0
    for name in ("1f1b", "zb1p", "dualpipe", "dualpipev"):
        plan = make_plan(config, EVEN, replace(recipe, devices=4, pp=4, batch=16, schedule=name))
        f = 1.0
        timetable = Timetable.of(make_schedule(name, 4, 16), Costs(f, 2 * f, f, 3 * f))
        idle = timetable.bubble / timetable.length
        planned = plan.seconds["idle in the pipeline"]
        share = planned / (planned + plan.seconds["computing"])
        assert share == pytest.approx(idle, abs=0.02), name


def test_zero_deals_out_moments_and_nothing_else():
    recipe = replace(PAPER.recipe, zero=0)
    whole = make_plan(V3, CLUSTERS["h800"], recipe)
    dealt = make_plan(V3, CLUSTERS["h800"], PAPER.recipe)
    for one, other in zip(whole.memory, dealt.memory, strict=True):
        numbers = one["gradients"] / 4
        assert one["master weights and moments"] == 8 * numbers
        assert other["master weights and moments"] < 2.1 * numbers
        assert {k: v for k, v in one.items() if k[0] != "m"} == {
            k: v for k, v in other.items() if k[0] != "m"
        }
    assert not whole.fits


@given(st.sampled_from(["float32", "bfloat16", "fp8"]), st.sampled_from([512, 4096]))
def test_recomputing_more_holds_less_and_takes_longer(precision, sequence):
    cluster = CLUSTERS["h800"].model_copy(
        update={"products": {"float32": 60.0, "bfloat16": 700.0, "fp8": 1250.0}}
    )
    recipe = Recipe(
        devices=64, batch=64, sequence=sequence, pp=4, ep=16, schedule="zb1p", precision=precision
    )
    plans = [
        make_plan(V3, cluster, replace(recipe, recompute=what))
        for what in ("none", "parts", "block")
    ]
    held = [plan.memory[1]["activations"] for plan in plans]
    assert held == sorted(held, reverse=True)
    times = [plan.seconds["computing"] for plan in plans]
    assert times == sorted(times)


def test_a_token_goes_to_few_nodes():
    v3 = TokenWork(V3, PAPER.recipe).travel(CLUSTERS["h800"])
    # 8 experts on 4 of 8 nodes: 3.6 nodes on the average, one in eight of them its own.
    assert v3.far == pytest.approx(4 * (1 - 0.75**8) * 7 / 8)
    free = TokenWork(V3.replace(n_group=1, topk_group=1), PAPER.recipe)
    assert free.travel(CLUSTERS["h800"]).far > 1.4 * v3.far
    one_node = TokenWork(V3, replace(PAPER.recipe, ep=8, devices=256)).travel(CLUSTERS["h800"])
    assert one_node.far == 0
    assert _distinct(8, 10_000) == pytest.approx(8)


def test_overlap_hides_the_exchange():
    both = {
        name: make_plan(V3, CLUSTERS["h800"], replace(PAPER.recipe, schedule=name))
        for name in ("1f1b", "dualpipe")
    }
    hidden, shown = (
        both[name].seconds["exchange that nothing hides"] for name in ("dualpipe", "1f1b")
    )
    assert hidden < shown
    assert both["dualpipe"].step_seconds < both["1f1b"].step_seconds


def test_a_search_finds_what_fits_and_is_fastest():
    found = search(V3, CLUSTERS["h800"], 2048, 15360, 4096, "fp8")
    assert all(plan.fits for plan in found)
    times = [plan.step_seconds for plan in found]
    assert times == sorted(times)
    papers = make_plan(V3, CLUSTERS["h800"], PAPER.recipe)
    assert found[0].step_seconds <= papers.step_seconds
    same = next(plan for plan in found if (plan.recipe.pp, plan.recipe.ep) == (16, 64))
    assert same.step_seconds <= papers.step_seconds
    (least,) = search(V3, CLUSTERS["h800"], 8, 64, 4096, "fp8")
    assert not least.fits


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"pp": 3}, "devices is 64; it must be a multiple of pp x ep = 3 x 1"),
        ({"batch": 65}, "batch is 65; it must be a multiple of micro_batch x ep x dp"),
        ({"precision": "float64"}, "precision is 'float64'; it must be one of float32"),
        ({"precision": "float32"}, "precision is 'float32'; H800, 8 a node is known to compute in"),
        ({"ep": 64, "n": 60}, "ep is 64; it must divide n_routed_experts = 60"),
        ({"pp": 64}, "64 pipeline stages and num_hidden_layers = 61"),
        ({"pp": 32, "schedule": "dualpipe"}, "dualpipe with 32 micro-batches; 32 ranks need 64"),
        ({"chunks": 2, "schedule": "zb1p"}, "chunks is 2 under zb1p; only 1f1b has them"),
        ({"sequence": 0}, "sequence is 0; it must be 1 or more"),
    ],
)
def test_bad_recipes_say_what_would_be_right(changes, said):
    config = V3
    if experts := changes.pop("n", None):
        config = V3.replace(n_routed_experts=experts, n_group=1, topk_group=1)
    with pytest.raises(PlanError, match=said):
        make_plan(
            config,
            CLUSTERS["h800"],
            Recipe(**({"devices": 64, "batch": 64, "sequence": 4096} | changes)),
        )


def test_clusters_are_read_from_files(tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text(as_toml(CLUSTERS["h100"]), encoding="utf-8")
    found = read_cluster(str(path))
    assert found.products == CLUSTERS["h100"].products
    assert found.kept == pytest.approx(CLUSTERS["h100"].kept)
    path.write_text("name = 'x'", encoding="utf-8")
    with pytest.raises(TrainConfigError, match=r"mine.toml: memory: Field required"):
        read_cluster(str(path))
    with pytest.raises(TrainConfigError, match="cluster is 'h900'; it must be one of h800, h100"):
        read_cluster("h900")


def test_this_machine_can_be_measured():
    found = measure_cluster()
    assert found.attention > 0
    assert found.products["float32"] * 1e12 > 1e9  # a billion a second: any machine there is
    assert found.bandwidth > 0.1


def test_the_command_line_plans_searches_and_draws(tmp_path):
    run = CliRunner().invoke
    given = ["plan", "--devices", "2048", "--tokens", "14.8e12"]
    mesh = ["--pp", "16", "--ep", "64"]
    shown = run(app, [*given, *mesh, "--plot", str(tmp_path / "plan.png")])
    assert shown.exit_code == 0, shown.output
    assert "pp 16 x ep 64 x dp 2" in shown.output
    assert "fits in 80" in shown.output
    assert "Errors at other published runs" in shown.output
    assert (tmp_path / "plan.png").stat().st_size > 10_000
    values = json.loads(run(app, [*given, *mesh, "--json"]).stdout)
    assert values["recipe"]["dp"] == 2
    assert values["device_hours"] == pytest.approx(2.664e6, rel=0.03)
    searched = run(app, ["plan", "--model", "v2-lite", "--devices", "16", "--batch", "256"])
    assert searched.exit_code == 0, searched.output
    assert "Meshes" in searched.output
    checked = run(app, ["plan", "--check"])
    assert "Kimi K2" in checked.output
    wrong = run(app, [*given, "--pp", "5"])
    assert wrong.exit_code == 2
    assert "devices is 2048; it must be a multiple of pp x ep = 5 x 1" in wrong.output
