"""What stands in this folder, each by its own tool or schema."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path

import kubernetes_validate
import promql_parser
import pytest
import yaml
from grafana_foundation_sdk.cog.plugins import register_default_plugins
from grafana_foundation_sdk.models.dashboard import Dashboard

HERE = Path(__file__).parents[1]
KUBERNETES = "1.31"
VARIABLES = {"$__rate_interval": "5m", "$instance": ".*"}


@pytest.fixture(scope="module")
def metrics():
    """The names of all series that a server has, from one that has answered."""
    from fastapi.testclient import TestClient  # noqa: PLC0415 - brings TensorFlow

    from ds_model import CausalLM, ModelConfig, Tokenizer  # noqa: PLC0415
    from ds_serve import EngineOptions, create_app  # noqa: PLC0415

    tokenizer = Tokenizer.train(["my fellow citizens of the union"] * 9, 300)
    model = CausalLM(ModelConfig.preset("tiny").replace(vocab_size=tokenizer.vocab_size))
    app = create_app(model, tokenizer, "tiny", options=EngineOptions(cache_tokens=2048))
    with TestClient(app) as client:
        body = {"model": "tiny", "prompt": "my", "max_tokens": 4}
        assert client.post("/v1/completions", json=body).status_code == 200
        text = client.get("/metrics").text
    return {line.split("{")[0].split(" ")[0] for line in text.splitlines() if line[:1] != "#"}


def manifests():
    for path in sorted((HERE / "kubernetes").glob("*.yaml")):
        for document in yaml.safe_load_all(path.read_text("utf-8")):
            yield pytest.param(document, id=f"{path.name}-{document['kind']}")


@pytest.mark.parametrize("document", list(manifests()))
def test_manifests_fit_kubernetes_schemas(document):
    kubernetes_validate.validate(document, KUBERNETES, strict=True)


def test_a_wrong_manifest_would_be_noticed():
    document = {"apiVersion": "v1", "kind": "Service", "metadata": {"nme": "x"}, "spec": {}}
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(document, KUBERNETES, strict=True)


def test_the_parts_of_the_manifests_belong_together():
    by_kind = {param.values[0]["kind"]: param.values[0] for param in manifests()}
    pod = by_kind["Deployment"]["spec"]["template"]
    (container,) = pod["spec"]["containers"]
    labels = pod["metadata"]["labels"]
    assert by_kind["Service"]["spec"]["selector"] == labels
    assert by_kind["PodDisruptionBudget"]["spec"]["selector"]["matchLabels"] == labels
    assert by_kind["HorizontalPodAutoscaler"]["spec"]["scaleTargetRef"]["name"] == "ds-serve"
    probes = [container[kind]["httpGet"]["path"] for kind in ("livenessProbe", "readinessProbe")]
    assert probes == ["/health", "/ready"]
    grace = float(container["args"][container["args"].index("--grace") + 1])
    assert pod["spec"]["terminationGracePeriodSeconds"] > grace + 5


def test_arguments_are_the_commands():
    from typer.testing import CliRunner  # noqa: PLC0415

    from ds_serve.cli import app  # noqa: PLC0415

    shown = CliRunner().invoke(app, ["serve", "--help"], env={"COLUMNS": "200"}).stdout
    dockerfile = (HERE / "Dockerfile").read_text("utf-8")
    manifest = (HERE / "kubernetes" / "serve.yaml").read_text("utf-8")
    lines = [line for line in dockerfile.splitlines() if line.startswith(("ENTRYPOINT", "CMD"))]
    lines += [line for line in manifest.splitlines() if "args:" in line]
    flags = set(re.findall(r'"(--[a-z-]+)"', "\n".join(lines)))
    assert flags >= {"--dtype", "--log", "--api-keys", "--grace"}
    assert all(flag in shown for flag in flags)


def names_in(expression):
    """The series that a PromQL expression reads; it must parse."""
    for variable, value in VARIABLES.items():
        expression = expression.replace(variable, value)
    promql_parser.parse(expression)
    return set(re.findall(r"\bds_serve_[a-z_]+", expression))


def rules():
    groups = yaml.safe_load((HERE / "prometheus" / "alerts.yaml").read_text("utf-8"))["groups"]
    return [rule for group in groups for rule in group["rules"]]


def test_alerts_parse_and_read_what_there_is(metrics):
    for rule in rules():
        assert set(rule) == {"alert", "expr", "for", "labels", "annotations"}
        assert rule["labels"]["severity"] in {"page", "ticket"}
        assert set(rule["annotations"]) == {"summary", "description"}
        assert names_in(rule["expr"]) <= metrics, rule["alert"]
    assert len({rule["alert"] for rule in rules()}) == len(rules()) >= 5


def test_the_autoscalers_rule_reads_what_there_is(metrics):
    (rule,) = yaml.safe_load((HERE / "prometheus" / "adapter.yaml").read_text("utf-8"))["rules"]
    assert rule["name"]["as"] in metrics
    autoscaler = yaml.safe_load((HERE / "kubernetes" / "autoscale.yaml").read_text("utf-8"))
    (metric,) = autoscaler["spec"]["metrics"]
    assert metric["pods"]["metric"]["name"] == rule["name"]["as"]


def test_the_dashboard_fits_grafanas_types_and_reads_what_there_is(metrics):
    register_default_plugins()
    text = json.loads((HERE / "grafana" / "dashboard.json").read_text("utf-8"))
    dashboard = Dashboard.from_json(text)
    assert dashboard.title == "ds-serve"
    assert len(dashboard.panels) == len(text["panels"]) >= 10
    places = set()
    for panel in text["panels"]:
        for target in panel["targets"]:
            assert names_in(target["expr"]) <= metrics, panel["title"]
        place = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert not cells & places
        places |= cells


def test_the_image_is_as_hadolint_wants_it():
    run = subprocess.run(
        ["hadolint", str(HERE / "Dockerfile")], capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stdout
