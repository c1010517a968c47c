"""Questions of public benchmarks as exam points, from small made-up files of their formats."""

import json

import pytest

from tests import refusals
from unigrpo_jax.data import __main__ as command
from unigrpo_jax.data import exam_points, importers, prompts

DPG = """\
item_id,text,keywords,proposition_id,dependency,category_broad,category_detailed,tuple,question_natural_language
stanford_7,"A cat, asleep.",cat,1,0,entity,whole,entity - whole (cat),Is there a cat?
stanford_7,"A cat, asleep.",cat,3,"1, 2",relation,spatial,relation,Is the cat on the mat?
stanford_7,"A cat, asleep.",mat,2,0,entity,whole,entity - whole (mat),Is there a mat?
partiprompts12,A red cup.,cup,1,0,entity,whole,entity - whole (cup),Is there a cup?
partiprompts12,A red cup.,"cup, red",2,1,attribute,color,attribute - color (cup),Is the cup red?
stanford_7,"A cat, asleep.",asleep,4,1,attribute,state,attribute,Is the cat asleep?
"""


def import_all(name, path, content):
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_text(content if isinstance(content, str) else json.dumps(content))
  return list(importers.SETS[name](path))


def points_of(record):
  return [(p.question, p.answer, p.needs) for p in exam_points.read(record)]


@pytest.mark.parametrize("name", ["dpg", "dsg"])
def test_dsg_and_dpg_keep_the_first_row_and_what_depends_on_what(name, tmp_path):
  cat, cup = import_all(name, tmp_path / "a.csv", DPG)
  assert (cat["prompt"], cat["tag"], cat["item_id"]) == ("A cat, asleep.", "stanford", "stanford_7")
  assert points_of(cat) == [
    ("Is there a cat?", "yes", ()), ("Is there a mat?", "yes", ()),
    ("Is the cat on the mat?", "yes", (1, 2)), ("Is the cat asleep?", "yes", (1,))]
  assert [point["category"] for point in cat["points"]] == [
    "entity", "entity", "relation", "attribute"]
  assert cup["tag"] == "partiprompts" and points_of(cup)[1] == ("Is the cup red?", "yes", (1,))


def test_a_question_comes_after_those_that_it_needs(tmp_path, capsys):
  rows = "".join(
    f"a_1,x,k,{number},{parents},c,d,t,q{number}\n"
    for number, parents in ((1, '"3,3"'), (2, 0), (3, 2), (5, 5), (6, '"9,2"'), (8, 6)))
  [record] = import_all("dsg", tmp_path / "a.csv", DPG.splitlines()[0] + "\n" + rows)
  assert points_of(record) == [
    ("q2", "yes", ()), ("q3", "yes", (1,)), ("q1", "yes", (2,)), ("q5", "yes", ()),
    ("q6", "yes", (1,)), ("q8", "yes", (5,))]
  said = capsys.readouterr().err
  assert "question 6 depends on [9, 2], of which there are [2]" in said
  assert "question 5 depends on [5], of which there are []" in said
  rows = "a_1,x,k,1,2,c,d,t,q\na_1,x,k,2,1,c,d,t,q\na_1,x,k,3,0,c,d,t,q\n"
  message = refusals.refusal(
    import_all, "dsg", tmp_path / "a.csv", DPG.splitlines()[0] + "\n" + rows)
  assert message.endswith("item_id=a_1: questions 1, 2 depend on each other")


def test_a_question_that_is_there_twice_is_pointed_out(tmp_path, capsys):
  rows = "a_1,x,k,1,0,c,d,t,old\na_1,x,k,1,0,c,d,t,new\n"
  [record] = import_all("dpg", tmp_path / "a.csv", DPG.splitlines()[0] + "\n" + rows)
  assert points_of(record) == [("new", "yes", ())]
  said = capsys.readouterr().err
  assert f"note: {tmp_path / 'a.csv'}, line 3: question 1 of item_id=a_1 is there twice" in said


def test_tifa_offers_its_choices(tmp_path):
  row = lambda **rest: {"id": "coco_3", "caption": "Two cats.", "element_type": "animal"} | rest
  [record, other] = import_all("tifa", tmp_path / "a.json", [
    row(question="are there cats?", choices=["yes", "no"], answer="yes"),
    row(id="drawbench_1", question="is it day?", choices=["no", "yes"], answer="no", caption="D."),
    row(question="how many cats?", choices=["1", "2", "3"], answer="2", element_type="counting"),
  ])
  assert (record["prompt"], record["tag"], record["item_id"]) == ("Two cats.", "coco", "coco_3")
  assert points_of(record) == [
    ("are there cats?", "yes", ()), ("how many cats? Choices: 1, 2, 3", "2", ())]
  assert [point["category"] for point in record["points"]] == ["animal", "counting"]
  assert points_of(other) == [("is it day?", "no", ())]


@pytest.mark.parametrize("folder", ["Q_D", "scripts/alignment/Q_D"])
def test_oneig_has_json_in_json_and_prompts_without_questions(folder, tmp_path):
  table = ("category,id,prompt_en,type,prompt_length,class\nPortrait,000,A man.,NP,short,None\n"
           "Text_Rendering,000,A sign.,NP,short,None\nPortrait,1,A boy.,T,long,fauvism\n")
  asked = {
    "000": {"question": '{"1": "Is there a man?", "2": "Is he old?"}',
            "dependency": '{"1": [0], "2": [1]}'},
    "001": {"question": {"1": "Is there a boy?"}, "dependency": {"1": [0]}},
  }
  questions = tmp_path / folder / "human.json"
  questions.parent.mkdir(parents=True)
  questions.write_text(json.dumps(asked))
  man, boy = import_all("oneig", tmp_path / "OneIG-Bench.csv", table)
  assert (man["prompt"], man["tag"]) == ("A man.", "Portrait")
  assert points_of(man) == [("Is there a man?", "yes", ()), ("Is he old?", "yes", (1,))]
  assert points_of(boy) == [("Is there a boy?", "yes", ())]
  for damaged, words in (
    ({"000": asked["000"]}, "no questions of id 1"),
    (asked | {"000": {"question": "{", "dependency": "{}"}}, "json, id 000: question: not JSON"),
    (asked | {"000": {"question": '{"a": "b"}', "dependency": "{}"}}, "question='a' must be"),
    (asked | {"000": {"question": {"1": 3}, "dependency": {}}}, "id 000: points, point 1: quest"),
    (asked | {"000": {"question": {"1": "q"}, "dependency": {"1": 0}}}, "dependency=0 must be a"),
  ):
    questions.write_text(json.dumps(damaged))
    assert words in refusals.refusal(list, importers.oneig(tmp_path / "OneIG-Bench.csv"))
  questions.unlink()
  assert "no such file" in refusals.refusal(list, importers.oneig(tmp_path / "OneIG-Bench.csv"))
  questions.parent.rmdir()
  assert "no folder Q_D" in refusals.refusal(list, importers.oneig(tmp_path / "OneIG-Bench.csv"))
  assert "No such file" in refusals.refusal(list, importers.oneig(tmp_path / "missing.csv"))


def test_geneval2(tmp_path):
  row = {"prompt": "three red pigs", "atom_count": 3, "vqa_list": [
    ["How many pigs are there?", "three"], ["Are the pigs red?", "Yes"]],
    "skills": ["count", "attribute"]}
  [record] = import_all("geneval2", tmp_path / "a.jsonl", row)
  assert record["tag"] == "3 atoms" and record["atom_count"] == 3 and "vqa_list" not in record
  assert points_of(record) == [
    ("How many pigs are there?", "three", ()), ("Are the pigs red?", "Yes", ())]
  assert [point["category"] for point in record["points"]] == ["count", "attribute"]
  message = refusals.refusal(import_all, "geneval2", tmp_path / "a.jsonl", {"prompt": "a"})
  assert "no vqa_list" in message


def test_wise_is_grouped_by_its_numbers(tmp_path):
  row = {"Prompt": "Einstein's violin", "Explanation": "He played one.", "Category": "Cultural",
         "Subcategory": "Celebrity"}
  groups = {1: "culture", 400: "culture", 401: "time", 520: "time", 521: "space", 640: "space",
            641: "biology", 760: "biology", 761: "physics", 880: "physics", 881: "chemistry",
            1000: "chemistry"}
  found = import_all("wise", tmp_path / "a.json", [row | {"prompt_id": n} for n in groups])
  assert [record["tag"] for record in found] == list(groups.values())
  assert found[0] == {
    "prompt": "Einstein's violin", "tag": "culture", "Explanation": "He played one.",
    "Category": "Cultural", "Subcategory": "Celebrity", "prompt_id": 1}
  for number in (0, 1001, "x"):
    rows = [row | {"prompt_id": number}]
    message = refusals.refusal(import_all, "wise", tmp_path / "a.json", rows)
    assert "item 1: " in message and "prompt_id=" in message


@pytest.mark.parametrize("name", importers.SETS)
def test_a_file_of_something_else_is_refused_by_its_line(name, tmp_path):
  (tmp_path / "Q_D").mkdir()
  message = refusals.refusal(import_all, name, tmp_path / "a.jsonl", {"other": "x"})
  assert message.startswith(f"{tmp_path / 'a.jsonl'}, line 1: no ") and "other" in message


@pytest.mark.parametrize(("name", "row", "words"), [
  ("dsg", {"item_id": 7, "text": 5, "proposition_id": 1, "question_natural_language": "q"},
   "text=5 must be text"),
  ("dsg", {"item_id": 7, "text": "x", "proposition_id": 1, "question_natural_language": ["q"]},
   "question_natural_language="),
  ("tifa", {"id": 1, "caption": ["x"], "question": "q", "answer": "a"}, "caption="),
  ("tifa", {"id": 1, "caption": "x", "question": 3, "answer": "a", "choices": ["a"]}, "question=3"),
  ("tifa", {"id": 1, "caption": "x", "question": "q", "answer": ["a"]}, "answer=['a'] must be"),
  ("oneig", {"id": 1, "category": ["x"], "prompt_en": "x"}, "category="),
  ("geneval2", {"prompt": ["x"], "vqa_list": [["q", "yes"]]}, "prompt="),
  ("wise", {"prompt_id": 1, "Prompt": 5}, "Prompt=5 must be text"),
])
def test_what_is_no_text_is_refused_by_its_line(name, row, words, tmp_path):
  (tmp_path / "Q_D").mkdir()
  message = refusals.refusal(import_all, name, tmp_path / "a.jsonl", row)
  assert message.startswith(f"{tmp_path / 'a.jsonl'}, line 1: ") and words in message


def test_numbers_of_json_are_those_of_a_table(tmp_path):
  rows = [{"item_id": 7, "text": "x", "proposition_id": number, "dependency": number - 1,
           "question_natural_language": f"q{number}"} for number in (1, 2)]
  [record] = import_all("dsg", tmp_path / "a.json", rows)
  assert record["item_id"] == "7" and points_of(record) == [("q1", "yes", ()), ("q2", "yes", (1,))]


def test_the_command_writes_points_that_open_as_prompts(tmp_path, capsys, monkeypatch):
  source, out = tmp_path / "dpg_bench.csv", tmp_path / "out.jsonl"
  source.write_text(DPG)
  command.main([f"--import=dpg={source}", f"--out={out}"])
  assert capsys.readouterr().out == f"{out}: 2 prompts with 6 questions, of {source}\n"
  opened = list(prompts.open_set(out, "test"))
  assert [len(exam_points.read(prompt.metadata)) for prompt in opened] == [4, 2]
  again = [f"--import=dpg={source}", f"--out={out}"]
  assert "exists already" in refusals.refusal(command.main, again)
  command.main([*again, "--overwrite"])
  monkeypatch.chdir(tmp_path)
  command.main([f"--import=dsg={source}"])
  assert (tmp_path / "dsg.jsonl").read_text() == out.read_text()
  for arguments, words in (
    ([f"--import=dgp={source}"], "--import='dgp' is none of dpg, dsg, tifa"),
    ([f"--import=dpg={source}", "--name=a"], "--import stands alone"),
    ([f"--import=dpg={source}", "--out=a.txt"], "must end in .jsonl"),
    (["--import=dpg=none.csv"], "none.csv: cannot be read"),
  ):
    assert words in refusals.refusal(command.main, arguments)
