import yaml

from calmerge.report.card import model_card
from calmerge.report.results import Input, Report


def test_front_matter_is_yaml_with_tags_and_pipeline(report: Report) -> None:
    _, front, _ = model_card(report, licence="apache-2.0").split("---\n", 2)
    assert yaml.safe_load(front) == {
        "library_name": "transformers",
        "tags": ["model-merging", "calmerge"],
        "pipeline_tag": "text-classification",
        "license": "apache-2.0",
    }


def test_base_model_is_named_only_if_it_is_a_hub_id(report: Report) -> None:
    inputs = {"base": Input(label="google/vit-base"), "cars": Input(label="cars")}
    text = model_card(report.model_copy(update={"inputs": inputs}))
    assert "base_model: google/vit-base\nbase_model_relation: merge" in text
    assert "base_model" not in model_card(report)


def test_results_and_commands_of_the_chosen_method(report: Report) -> None:
    text = model_card(report, label="CALM", folder="out")
    assert "| task | CALM | base | experts |" in text
    assert "calmerge export out --task tweets --out tweets" in text
    assert "AutoModelForSequenceClassification.from_pretrained" in text
    assert "sequential: 2" in text


def test_card_without_scores_has_no_results(report: Report) -> None:
    bare = report.model_copy(update={"rows": [row.model_copy(update={"scores": {}}) for row in report.rows[2:3]]})
    assert "## Results" not in model_card(bare)


def test_a_whole_model_is_loaded_as_it_lies(report: Report) -> None:
    text = model_card(report, folder="out", whole="WhisperForConditionalGeneration")
    assert 'WhisperForConditionalGeneration.from_pretrained("out")' in text
    assert "calmerge export" not in text


def test_models_without_tasks_are_called_models(report: Report) -> None:
    rows = [row.model_copy(update={"scores": {}}) for row in report.rows[2:3]]
    inputs = {"a": Input(label="./a"), "b": Input(label="./b")}
    update = {"tasks": [], "rows": rows, "title": "both: 2 towers", "inputs": inputs}
    text = model_card(report.model_copy(update=update))
    assert "# both: 2 towers\n" in text
    assert "One model made from several models" in text
    assert "Models: `a`, `b`." in text
