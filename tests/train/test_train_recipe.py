import pytest
import yaml

from dynmask.train.mixture import Mixture
from dynmask.train.recipe import Phase, Recipe, named_recipes
from dynmask.train.run import build_model

GOOD = {
    "model": {"max_position_embeddings": 128, "hidden_size": 16},
    "phases": [{"length": 64, "steps": 3}, {"length": 128, "steps": 2}],
    "tokens_per_step": 256,
}


def load(tmp_path, **changes):
    raw = {k: v for k, v in (GOOD | changes).items() if v is not ...}
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(raw), encoding="utf-8")
    return Recipe.load(path)


def test_load(tmp_path):
    recipe = load(tmp_path, mixture={"questions": [2, 3]}, betas=[0.8, 0.9], lr=1)
    assert recipe.phases == (Phase(64, 3), Phase(128, 2))
    assert recipe.mixture == Mixture(questions=(2, 3))
    assert (recipe.betas, recipe.lr, recipe.steps, recipe.longest) == ((0.8, 0.9), 1, 5, 128)
    assert [recipe.length_at(step) for step in range(5)] == [64, 64, 64, 128, 128]
    for step in (-1, 5):
        with pytest.raises(ValueError, match=f"step={step} is not in"):
            recipe.length_at(step)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"learning_rate": 1}, "recipe: unknown field learning_rate; known are model, phases"),
        ({"mixture": {"book": 1}}, "recipe: mixture: unknown field book; known are text"),
        ({"mixture": {"text": -1.0}}, "mixture: text=-1.0"),
        ({"mixture": {"questions": 4}}, "mixture: questions=4 must be a list of two integers"),
        ({"mixture": [1]}, "mixture=.* must be a mapping"),
        ({"model": ...}, "the field 'model' is missing"),
        ({"model": {}}, "max_position_embeddings=0 must be given and at least 128"),
        ({"model": {"max_position_embeddings": 64}}, "max_position_embeddings=64"),
        ({"phases": ...}, "the field 'phases' is missing"),
        ({"phases": []}, "phases: give at least one"),
        ({"phases": 5}, "phases=5 must be a list"),
        ({"phases": [5]}, "recipe: phases: 5 is not a mapping"),
        ({"phases": [{"length": 64}]}, "recipe: phases: the field 'steps' is missing"),
        ({"phases": [{"length": 32, "steps": 1}]}, "length >= 64"),
        ({"phases": [{"length": 96, "steps": 1}]}, "divides tokens_per_step=256"),
        ({"phases": [{"length": 64, "steps": 0}]}, "steps >= 1"),
        ({"phases": [{"length": 64, "steps": 1.5}]}, "steps=1.5 must be an integer"),
        ({"tokens_per_step": -256}, "tokens_per_step=-256"),
        ({"lr": "2e-3"}, "lr='2e-3' must be a number"),
        ({"lr": 0}, "lr=0 is out of its range"),
        ({"floor": 2}, "floor=2"),
        ({"seed": -1}, "seed=-1"),
        ({"seed": True}, "seed=True must be an integer"),
        ({"betas": [0.9]}, "betas=.* must be a list of two numbers"),
        ({"betas": [0.9, 1.0]}, "betas=.* is out of its range"),
    ],
)
def test_wrong_recipe_is_refused_by_name(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        load(tmp_path, **changes)


@pytest.mark.parametrize("text", ["- a list", "a: [", ""])
def test_no_recipe_at_all(tmp_path, text):
    path = tmp_path / "recipe.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match="recipe"):
        Recipe.load(path)
    with pytest.raises(ValueError, match="the name of a recipe: embedded"):
        Recipe.load("no-such-recipe")


@pytest.mark.parametrize("name", named_recipes())
def test_recipes_of_the_package(name, tokenizer):
    recipe = Recipe.load(name)
    model = build_model(recipe, tokenizer)
    assert len(tokenizer) == recipe.vocab_size
    assert model.num_parameters() == {"embedded": 11_309_952}[name]


def test_unknown_field_of_the_model(tokenizer, tmp_path):
    recipe = load(tmp_path, model=GOOD["model"] | {"num_layers": 2})
    with pytest.raises(ValueError, match="model: unknown field num_layers; known are"):
        build_model(recipe, tokenizer)
