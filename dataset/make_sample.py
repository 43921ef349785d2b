"""Write the small bilingual corpus that the demo trains on.

The sample states a small world of true, commonplace facts in English and Chinese, each fact many
times and in many wordings, so that a tiny model can learn the fact itself and not one sentence.

Templates are written in a mini-notation: ``{name}`` is a field and ``[a|b|c]`` a free choice.
Clauses start in lower case and have no full stop, so that they fit into longer sentences.
"""

import argparse
import json
import os
import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

SEED = 20240607
BYTES_PER_LANGUAGE = 580_000
MIN_BYTES, MAX_BYTES = 88, 900
DEFAULT_OUTPUT = Path(__file__).resolve().parent / "pretrain_sample.jsonl"
# Prompts for the trained model and their answers; the sample must not contain the two together.
PLAIN_PROMPTS = Path(__file__).resolve().parents[1] / "tests" / "plain_prompts.tsv"

Row = tuple[str, str, str, str]
Pairs = tuple[tuple[str, str], ...]


class Phrases(NamedTuple):
    """The wordings of a relation in one language; a document keeps to one language."""

    title: str
    statements: tuple[str, ...]
    questions: Pairs
    follows: tuple[str, ...] = ()  # may only come after the subject has been named


class Relation(NamedTuple):
    """A kind of fact; the weight says how often one of its rows is stated."""

    weight: float
    rows: tuple[Row, ...]
    en: Phrases
    zh: Phrases


# --------------------------------------------------------------------------------------- facts

# English, Chinese, then pairs: capital, continent.
COUNTRIES = (
    ("China", "中国", "Beijing", "北京", "Asia", "亚洲"),
    ("Japan", "日本", "Tokyo", "东京", "Asia", "亚洲"),
    ("France", "法国", "Paris", "巴黎", "Europe", "欧洲"),
    ("Britain", "英国", "London", "伦敦", "Europe", "欧洲"),
    ("Germany", "德国", "Berlin", "柏林", "Europe", "欧洲"),
    ("Italy", "意大利", "Rome", "罗马", "Europe", "欧洲"),
    ("Egypt", "埃及", "Cairo", "开罗", "Africa", "非洲"),
    ("Brazil", "巴西", "Brasilia", "巴西利亚", "South America", "南美洲"),
)

# English, Chinese, then pairs: sound, food ("" where none is well known).
ANIMALS = (
    ("cat", "猫", "meow", "喵喵", "fish", "鱼"), ("dog", "狗", "woof", "汪汪", "bones", "骨头"),
    ("cow", "牛", "moo", "哞哞", "grass", "青草"), ("sheep", "绵羊", "baa", "咩咩", "", ""),
    ("pig", "猪", "oink", "哼哼", "", ""), ("duck", "鸭子", "quack", "嘎嘎", "", ""),
    ("panda", "大熊猫", "", "", "bamboo", "竹子"), ("rabbit", "兔子", "", "", "carrots", "胡萝卜"),
    ("monkey", "猴子", "", "", "bananas", "香蕉"),
)

# From here on the rows are: English subject, English answer, Chinese subject, Chinese answer.
JOBS = (
    ("teacher", "teach children", "老师", "教学生"),
    ("doctor", "treat sick people", "医生", "给人看病"), ("farmer", "grow crops", "农民", "种庄稼"),
    ("baker", "bake bread", "面包师", "烤面包"), ("firefighter", "put out fires", "消防员", "灭火"),
    ("pilot", "fly planes", "飞行员", "开飞机"),
)

COLOURS = (
    ("a banana", "yellow", "香蕉", "黄色"), ("grass", "green", "[小|]草", "绿色"),
    ("the [clear |]sky", "blue", "[晴朗的|]天空", "蓝色"), ("snow", "white", "雪", "白色"),
    ("coal", "black", "煤", "黑色"), ("a strawberry", "red", "草莓", "红色"),
)
OPPOSITE_PAIRS = (
    ("big", "small", "大", "小"), ("hot", "cold", "热", "冷"), ("fast", "slow", "快", "慢"),
    ("happy", "sad", "高兴", "难过"),
)
DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
DAYS_ZH = ("星期一", "星期二", "星期三", "星期四", "星期五", "星期六", "星期天")
SEASONS, SEASONS_ZH = ("spring", "summer", "autumn", "winter"), ("春天", "夏天", "秋天", "冬天")
RECORDS = (
    ("the largest planet [of|in] the solar system", "Jupiter", "太阳系[里|]最大的行星", "木星"),
    ("the planet closest to the Sun", "Mercury", "离太阳最近的行星", "水星"),
    ("the planet that we call the red planet", "Mars", "人们说的红色行星", "火星"),
    ("the highest mountain in the world", "Mount Everest", "世界上最高的[山峰|山]", "珠穆朗玛峰"),
    ("the largest ocean in the world", "the Pacific", "世界上最大的海洋", "太平洋"),
    ("the tallest animal in the world", "the giraffe", "世界上最高的动物", "长颈鹿"),
)
# Each of these rows needs a different sentence, so the wordings are in the subject.
NATURE = (
    ("[water freezes at|the freezing point of water is|water turns into ice at|ice forms at"
     "|water becomes ice at|in winter the lake freezes at|water always freezes at]",
     "zero degrees Celsius",
     "[水结冰的温度是|水的冰点是|水变成冰的温度是|水开始结冰是在|湖水结冰的温度是|水冻成冰是在"
     "|水结成冰是在"
     "|河水结成冰的温度是|水会结成冰的温度是]",
     "零摄氏度"),
    ("[water boils at|the boiling point of water is|water turns into steam at|a kettle boils at"
     "|water becomes steam at|in the kitchen water boils at|water always boils at"
     "|water begins to boil at"
     "|the water in a pot boils at]", "one hundred degrees Celsius",
     "[水烧开的温度是|水的沸点是|水沸腾的温度是|水变成水汽是在|开水的温度是|水开始沸腾是在"
     "|水的沸点就是"
     "|水的沸点正好是|到了沸点，水温是|人们知道水的沸点大约是]",
     "一百摄氏度"),
    ("[the Sun rises in|the Sun comes up in|the direction of sunrise is|every morning the Sun "
     "rises in|to see the sunrise, you look to|the day begins with light from"
     "|the Sun always rises in"
     "|the Sun rises each day in|the Sun rises every morning in]", "the east",
     "[太阳升起的方向是|早晨太阳出来的方向是|日出的方向是|要看日出，就要面向|太阳升起在"
     "|太阳升起的方向就是"
     "|早上太阳升起的地方是]", "东方"),
    ("[the Sun sets in|the Sun goes down in|the direction of sunset is|every evening the Sun "
     "sets in|to see the sunset, you look to|the day ends with light from|the Sun always sets in"
     "|the Sun sets each day in|the Sun sets every evening in]", "the west",
     "[太阳落下的方向是|傍晚太阳下山的方向是|日落的方向是|要看日落，就要面向|太阳落下在"
     "|太阳落下的方向就是"
     "|晚上太阳落下的地方是]", "西方"),
)
MADE = (
    ("bread", "flour", "面包", "面粉"), ("cheese", "milk", "奶酪", "牛奶"),
    ("glass", "sand", "玻璃", "沙子"), ("paper", "wood", "纸", "木头"),
    ("tofu", "soybeans", "豆腐", "黄豆"),
)
BOOKS = (
    ("Journey to the West", "Wu Cheng'en", "《西游记》", "吴承恩"),
    ("Dream of the Red Chamber", "Cao Xueqin", "《红楼梦》", "曹雪芹"),
    ("Hamlet", "Shakespeare", "《哈姆雷特》", "莎士比亚"),
    ("Don Quixote", "Cervantes", "《堂吉诃德》", "塞万提斯"),
    ("War and Peace", "Tolstoy", "《战争与和平》", "托尔斯泰"),
)


# Questions about facts whose relation has no common wording for them, by English answer.
ASKED = {
    "zero degrees Celsius": (
        "[at what|at which] temperature does [water|the lake] [freeze|turn into ice|become ice]?",
        "[水[在多少度|在什么温度下|多少度会|到多少度就会][结冰|变成冰|冻成冰]|水的冰点有多少度]？"),
    "one hundred degrees Celsius": (
        "[at what|at which] temperature does [water|a kettle] [boil|turn into steam|become steam]?",
        "[水[在多少度|在什么温度下|多少度会|到多少度就会][沸腾|烧开|变成水汽]|水的沸点有多少度]？"),
    "the east": (
        "[where|in which direction|on which side] does the Sun [rise|come up]?",
        "[太阳|早晨太阳]从[哪边|哪里|哪个方向|哪一边][升起|升起来|出来]？"),
    "the west": (
        "[where|in which direction|on which side] does the Sun [set|go down]?",
        "[太阳|傍晚太阳][从|在][哪边|哪里|哪个方向|哪一边][落下|下山]？"),
    "Jupiter": (
        "which planet [of|in] the solar system is the largest?", "太阳系里哪颗行星最大？"),
    "Mercury": (
        "which planet is [the |][closest|nearest] to the Sun?", "哪颗行星离太阳最近？"),
    "Mars": (
        "which planet [is called|do we call] the red planet?", "哪颗行星叫红色行星？"),
    "Mount Everest": (
        "which mountain [in the world |]is the highest?", "世界上哪座山[峰|]最高？"),
    "the Pacific": (
        "which ocean [in the world |]is the largest?", "世界上哪个海洋最大？"),
    "the giraffe": (
        "which animal [in the world |]is the tallest?", "世界上哪种动物最高？"),
}


# ----------------------------------------------------------------------------------- relations


def column(table: tuple[tuple[str, ...], ...], index: int) -> tuple[Row, ...]:
    """Turn one pair of a table's columns into rows."""
    cut = 2 + 2 * index
    return tuple((r[0], r[cut], r[1], r[cut + 1]) for r in table if r[cut])


def cycle(english: tuple[str, ...], chinese: tuple[str, ...]) -> tuple[Row, ...]:
    """Link each item to the next one: their order is the fact."""
    follow = zip(english[1:] + english[:1], chinese[1:] + chinese[:1], strict=True)
    pairs = zip(english, chinese, follow, strict=True)
    return tuple((en, next_en, zh, next_zh) for en, zh, (next_en, next_zh) in pairs)


def order(
    weight: float, rows: tuple[Row, ...], noun: str, noun_zh: str, which_zh: str
) -> Relation:
    """Build a what-comes-next relation; days, months and seasons share their wordings."""
    en = Phrases(
        f"Each {noun} and the next one",
        (f"the {noun} after {{s}} is {{o}}", "[right |soon |]after {s} comes {o}",
         "{s} is followed by {o}", "{o} [comes|follows] [right |straight |]after {s}",
         f"the {noun} that [comes after|follows] {{s}} is {{o}}", "when {s} is over, it is {o}",
         f"the next {noun} after {{s}} is {{o}}", f"{{o}} is the {noun} after {{s}}",
         "once {s} has passed, we have {o}", "first comes {s} and then {o}",
         f"if this {noun} is {{s}}, the next {noun} is {{o}}"),
        ((f"[which|what] {noun} [comes|is] [right |]after {{s}}?", "{o}"),
         ("what comes after {s}?", "{o}"), (f"[which|what] {noun} follows {{s}}?", "{o}"),
         (f"what is the [{noun} after|next {noun} after] {{s}}?", "{o}")),
    )
    zh = Phrases(
        f"下{noun_zh}是什么",
        ("{s}[之后|过后|后面|的后面|的下一个]是{o}", "{s}过[去了|完了]，[就是|接着是]{o}",
         "{o}[在|排在]{s}的后面", "紧跟在{s}后面的是{o}", "{s}一结束，{o}就来了",
         *[f"{{s}}的[下|后]{noun_zh}是{{o}}"] * 3, "先是{s}，然后是{o}", "{s}过了[就|才]是{o}"),
        (("什么跟在{s}的后面？", "{o}"), (f"请说出{{s}}的下{noun_zh}。", "{o}"),
         (f"你知道{{s}}的下{noun_zh}吗？", "{o}"),
         (f"{{s}}[的后面|后面|之后|过后|过了]是{which_zh}？", "{o}"),
         (f"{{s}}的[下|后]{noun_zh}是{which_zh}？", "{o}")),
    )
    return Relation(weight, rows, en, zh)


RELATIONS = {
    "capital": Relation(6, column(COUNTRIES, 0),
        Phrases("Countries and their capitals", ("the [capital|capital|capital city] of {s} is {o}",
            *["{o} is the [capital|capital city] of {s}"] * 3,
            "{s} has a capital [called|named] {o}",
            *["{s}'s capital is {o}"] * 2, "in {s}, the capital [|city |of the country ]is {o}",
            "the country whose capital is {o} is {s}", "the name of the capital of {s} is {o}",
            "{s} is governed from {o}", "the city that serves as the capital of {s} is {o}",
            "if you [visit|travel to|fly to] the capital of {s}, you [come to|are in] {o}",
            "[people|those] who live in the capital of {s} live in {o}",
            "many people live in the capital of {s}, in {o}",
            "when you [go to|think of] {s}, remember that the capital is {o}",
            "{s} is a country with the capital {o}",
            "{o} [has long been|serves as|is still|was chosen as] the capital of {s}",
            "in {o}, you are in the capital of {s}", "{o} is a city in {s}, and its capital"),
            (("what is the capital of {s}?", "{o}"), ("which city is the capital of {s}?", "{o}"),
             ("what is the capital city of {s} called?", "{o}"),
             ("can you name the capital of {s}?", "{o}"), ("what is {s}'s capital?", "{o}"),
             ("[which country has the capital {o}|which country's capital is {o}]?", "{s}")),
            ("its capital is {o}", "the capital of the country is {o}",
             "the capital is [called|named] {o}", "{o} is its capital",
             "the country has {o} as its capital")),
        Phrases("国家和首都", (*["{s}的首都[是|是|就是|叫|叫做|名叫]{o}"] * 4,
            "[人人知道|听说]{s}的首都是{o}", "{o}[是|就是]{s}的首都", "{s}这个国家的首都[是|叫]{o}",
            "{s}把首都[设|定]在{o}", "说[到|起]{s}的首都，[大家|人们]就会想到{o}",
            "在{s}，首都[是|叫]{o}", "首都是{o}的国家是{s}", "{s}首都的名字[是|叫]{o}",
            "{s}政府所在的城市是{o}", "{o}一直是{s}的首都", "{o}这座城市是{s}的首都",
            "作为{s}的首都，{o}很有名", "[有人|许多人]住在{s}的首都{o}",
            "到了{s}的首都，就是到了{o}"),
            (("哪里是{s}的首都？", "{o}"), ("哪座城市是{s}的首都？", "{o}"),
             ("哪个国家的首都是{o}？", "{s}"), ("你知道{s}的首都吗？", "{o}"),
             ("请说出{s}的首都。", "{o}"), ("{s}的首都[叫|是]什么？", "{o}"),
             ("{s}的首都[是|在]哪[里|座城市|个城市]？", "{o}"),
             ("{o}是哪[个国家|国]的首都？", "{s}")),
            ("它的首都是{o}", "这个国家的首都[是|叫]{o}", "首都是{o}", "{o}是它的首都"))),
    "continent": Relation(2.5, column(COUNTRIES, 1),
        Phrases("Countries and their continents", (*["{s} [is|lies] in {o}"] * 2,
            "{s} is a [big |]country in {o}", "you can find {s} in {o}",
            "{s} belongs to the continent of {o}", "the continent of {s} is {o}",
            "[one of the countries|a country] of {o} is {s}",
            "to visit {s}, you must travel to {o}", "{s} is found in {o}",
            "on the map, {s} is part of {o}",
            "the people of {s} live in {o}"),
            (*[("which continent is {s} in?", "{o}"), ("where is {s}?", "in {o}")] * 2,
             ("on which continent can you find {s}?", "{o}"),
             ("[what|which] continent [does {s} belong to|is {s} part of]?", "{o}")),
            ("this country [lies|is] in {o}", "the country is part of {o}",
             "this is a country in {o}")),
        Phrases("国家和大洲", (*["{s}[在|位于|属于]{o}"] * 4, "{s}是{o}的一个国家",
            "{s}是一个{o}国家",
            "在地图上，{s}[属于|在]{o}", "要去{s}，就要到{o}去", "{s}所在的大洲是{o}",
            "{s}人生活在{o}"),
            (("哪个大洲有{s}？", "{o}"), ("在哪个大洲能找到{s}？", "{o}"),
             ("请说出{s}所在的大洲。", "{o}"),
             ("{s}[在|位于|属于]哪[个洲|个大洲|一个洲]？", "{o}"), ("{s}是哪个洲的国家？", "{o}")),
            ("这个国家[在|位于]{o}", "这个国家属于{o}", "这是{o}的一个国家"))),
    "sound": Relation(5, column(ANIMALS, 0),
        Phrases("Animals and their sounds", ("[a|the|every|the little|the old] {s} says {o}",
            "{p} say {o}", "the sound of [a|the|the little|a happy] {s} is {o}",
            "[a|the] {s} goes {o}", "the sound that {a} makes is {o}",
            "when {a} [opens its mouth|calls], you hear {o}", "{o} is the [sound|call] of {a}",
            "if you hear {o}, there is {a} nearby", "when {a} is [hungry|happy], it says {o}",
            "the {s} always says {o}", "the call of {a} is {o}"),
            (("what does {a} say?", "{o}"), ("what sound does {a} make?", "{o}"),
             ("which animal says {o}?", "{a}"), ("what sound do {p} make?", "{o}")),
            ("this animal says {o}", "the call of this animal is {o}", "the {s} says {o}")),
        Phrases("动物的叫声", (*["{s}的叫声是{o}"] * 3, "{s}{o}[地|]叫", "{s}叫起来[的声音|]是{o}",
            "{s}的声音是{o}", "[可爱的|可爱的小]{s}叫起来是{o}", "[小|老]{s}的叫声是{o}",
            "{s}[饿了|高兴了]就{o}叫", "听到{o}的声音，就知道{s}来了", "{s}会发出{o}的声音",
            "{s}说话的声音是{o}", "{s}总是{o}、{o}地叫"),
            (("{s}[怎么叫|怎样叫|是怎么叫的|叫起来是什么声音]？", "{o}"),
             ("{s}的[叫声|声音]是[什么|怎样的]？", "{o}"), ("什么动物{o}叫？", "{s}"),
             ("你知道{s}的叫声吗？", "{o}"), ("谁能学{s}叫？", "{o}"),
             ("怎么学{s}叫？", "{o}")),
            ("它的叫声是{o}", "它{o}地叫", "它会发出{o}的声音"))),
    "food": Relation(5, column(ANIMALS, 1),
        Phrases("What animals eat", ("{p} [eat|like to eat|love to eat|feed on] {o}",
            "[a|the|the little|every] {s} [eats|likes to eat|loves to eat|feeds on] {o}",
            "the favourite food of [a|the|the little|every] {s} is {o}",
            "what {a} likes to eat is {o}", "{p} live on {o}", "a hungry {s} [looks for|wants] {o}",
            "the [meal|food] that {p} like best is {o}", "the best food for {a} is {o}",
            "the animal that loves {o} is the {s}", "if you feed {a}, you give it {o}",
            "few things make {a} happier than {o}"),
            (("what do {p} eat?", "{o}"), ("what does {a} like to eat?", "{o}"),
             ("what is the favourite food of {a}?", "{o}"), ("which animal likes {o}?", "{a}"),
             ("what is {a} looking for when it is hungry?", "{o}")),
            ("this animal [eats|likes] {o}", "its food is {o}", "the {s} loves {o}")),
        Phrases("动物的食物", (*["{s}[吃|爱吃|喜欢吃|最爱吃|最喜欢吃]{o}"] * 4,
            "{s}的[食物|美食|午饭]是{o}", "{o}是{s}的[食物|美食]", "{s}饿了就[找|吃]{o}",
            "喂{s}要用{o}", "爱吃{o}的动物是{s}", "{s}最喜欢的食物是{o}",
            "[可爱的|可爱的小]{s}[爱吃|最爱吃]{o}", "[小|老]{s}[爱吃|最爱吃]{o}",
            "给{s}准备的饭是{o}", "{s}每天都要吃{o}"),
            (("{s}[吃|爱吃|喜欢吃|最爱吃|最喜欢吃]什么？", "{o}"),
             ("{s}的食物是什么？", "{o}"), ("什么动物爱吃{o}？", "{s}"), ("该给{s}吃什么？", "{o}"),
             ("什么是{s}的食物？", "{o}"),
             ("拿什么来喂{s}？", "{o}")),
            ("它[爱吃|喜欢吃|吃]{o}", "它最喜欢的食物是{o}", "它饿了就找{o}"))),
    "task": Relation(4, JOBS,
        Phrases("Jobs and tasks", ("[a|a good|every|the] {s} {v}",
            "the [job|work|task|duty] of [a|a good|every|the] {s} is to {o}", "{p} {o}",
            "it is the job of {a} to {o}", "every day [a|the] {s} {v}",
            "[a person|someone|the one] who {v} is {a}", "it is the {s} who {v}",
            "when somebody {v}, it is {a}", "what {a} does at work is to {o}",
            "if you become {a}, you will {o}", "the person whose job is to {o} is {a}"),
            (("what does [{a}|the {s}] do?", "{v}"), ("what is the job of {a}?", "to {o}"),
             *[("who {v}?", "{a}")] * 3, ("what do {p} do?", "they {o}")),
            ("the job is to {o}", "such a person {v}")),
        Phrases("职业和工作", (*["{s}的工作[是|是|就是]{o}"] * 2, "{s}[每天|天天|常常|]{o}",
            "{s}负责{o}",
            "{o}的人是{s}", "当了{s}，就要{o}", "一名[好|]{s}要会{o}", "一名[好|]{s}的工作是{o}",
            "{o}是{s}的[工作|任务]", "{s}每天的工作[是|就是]{o}", "他是{s}，每天的工作是{o}"),
            (("{s}[是做什么的|做什么|每天做什么|是干什么的]？", "{o}"),
             ("{s}的[工作|任务]是什么？", "{o}"), ("谁[来|会|负责]{o}？", "{s}"),
             ("什么人[负责|来]{o}？", "{s}"), ("你知道{s}的工作吗？", "{o}"),
             ("什么是{s}的工作？", "{o}")),
            ("这份工作就是{o}", "做这行要会{o}"))),
    "colour": Relation(3.5, COLOURS,
        Phrases("Things and their colours", ("{s} is {o}", "the colour of {s} is {o}",
            "to [paint|draw] {s}, you need [the colour |a pencil that is ]{o}",
            "{o} is the colour of {s}", "when you look at {s}, you see the colour {o}",
            "{s} has the colour {o}", "{s} looks {o}", "if you draw {s}, you [colour|paint] it {o}",
            "in the picture {s} is {o}", "in the [book|drawing], the colour of {s} is {o}"),
            (("what colour is {s}?", "{o}"), ("what is the colour of {s}?", "{o}"),
             ("which colour does {s} have?", "{o}"),
             ("which pencil do you need to draw {s}?", "the {o} one"))),
        Phrases("各种颜色", (*["{s}[是|是|都是]{o}的", "{s}的颜色[是|是|就是]{o}"] * 3,
            "{o}是{s}的颜色",
            "画{s}要用{o}", "{s}看上去是{o}的", "{s}穿着{o}的衣裳", "给{s}涂颜色，要涂{o}",
            "图画里的{s}是{o}的", "说到{s}的颜色，[大家|人们]会说{o}"),
            (("用什么颜色画{s}？", "{o}"), ("你知道{s}的颜色吗？", "{o}"),
             ("哪种颜色是{s}的颜色？", "{o}"), ("{s}是什么颜色[的|]？", "{o}"),
             ("{s}的颜色是什么？", "{o}")))),
    "opposite": Relation(4.5, OPPOSITE_PAIRS + tuple((b, a, d, c) for a, b, c, d in OPPOSITE_PAIRS),
        Phrases("Opposites", ("the opposite of {s} is {o}", "{s} and {o} are opposites",
            "{s} is the opposite of {o}", "the opposite of the word {s} is {o}",
            "if something is not {s}, it may be {o}", "the word {s} has the opposite {o}",
            "if you do not say {s}, you can say the opposite, {o}", "the other end of {s} is {o}",
            "the reverse of the word {s} is {o}"),
            (("what is the opposite of {s}?", "{o}"), ("which word is the opposite of {s}?", "{o}"),
             ("what is the opposite of the word {s}?", "{o}"))),
        Phrases("反义词", (*["“{s}”的反义词[是|就是]“{o}”"] * 3,
            "“{s}”和“{o}”[是一对反义词|意思相反]", "与“{s}”[相反|相对]的[词|字]是“{o}”",
            "“{s}”反过来就是“{o}”", "“{s}”的反面是“{o}”", "和“{s}”意思相反的是“{o}”",
            "“{s}”字的反义词是“{o}”", "“{s}”这个词的反义词是“{o}”"),
            (("什么词和“{s}”意思相反？", "{o}"), ("你知道“{s}”的反义词吗？", "{o}"),
             ("哪个词是“{s}”的反义词？", "{o}"), ("“{s}”的[反义词|反面]是什么？", "“{o}”"),
             ("和“{s}”相反的词是什么？", "“{o}”")))),
    "day": order(4.5, cycle(DAYS, DAYS_ZH), "day", "一天", "[星期几|什么]"),
    "season": order(4, cycle(SEASONS, SEASONS_ZH), "season", "一个季节",
                    "[什么季节|哪个季节|什么]"),
    "record": Relation(3.5, RECORDS,
        Phrases("Records and names", ("{s} is {o}", "{o} is {s}", "the name of {s} is {o}",
            "when people speak of {s}, they mean {o}", "if you ask for {s}, the answer is {o}",
            "{s} [has the name|goes by the name of] {o}", "in the quiz, {s} was {o}",
            "the answer to the question about {s} is {o}"),
            (("what is {s}?", "{o}"), ("what is the name of {s}?", "{o}"),
             ("can you name {s}?", "{o}"), ("{q}", "{o}"))),
        Phrases("世界之最和名字", (*["{s}[是|是|就是|叫]{o}"] * 3, "{o}[是|就是]{s}",
                            "{s}的名字[是|叫]{o}",
            "说[到|起]{s}，[人们|大家]就会想到{o}", "如果有人问起{s}，答案是{o}", "{s}叫做{o}",
            "{s}不是别的，正是{o}"),
            (("什么是{s}？", "{o}"), ("你知道{s}吗？", "{o}"), ("请说出{s}。", "{o}"),
             ("{s}[是|叫]什么？", "{o}"), ("{q}", "{o}")))),
    "nature": Relation(5, NATURE,
        Phrases("Nature", ("{s} {o}",),
            (("what do you know about {o}?", "{s} {o}"),
             ("can you tell me something about {o}?", "{s} {o}"), *[("{q}", "{o}")] * 4)),
        Phrases("自然常识", ("{s}{o}",),
            (("关于{o}，你知道什么？", "{s}{o}"), ("你能说说{o}吗？", "{s}{o}"), *[("{q}",
                "{o}")] * 4))),
    "made": Relation(4.5, MADE,
        Phrases("What things are made from", ("{s} is made [from|of|out of] {o}",
            "people make {s} from {o}",
            "to make {s}, you need {o}", "{o} can be turned into {s}",
            "[a worker|the factory] turns {o} into {s}", "we get {s} from {o}",
            "the main ingredient of {s} is {o}", "{s} comes from {o}",
            "without {o} there would be no {s}", "[good|fine] {s} is made from {o}",
            "the {s} in the shop is made from {o}"),
            (("what is {s} made [from|of|out of]?", "{o}"), ("what do you need to make {s}?",
                "{o}"),
             ("what can be made from {o}?", "{s}"))),
        Phrases("东西是用什么做的", (*["{s}是用{o}做的"] * 4, "做{s}要用{o}", "{o}可以做成{s}",
            "人们用{o}做{s}", "[做|]{s}的原料是{o}", "{s}来自{o}", "没有{o}，就没有{s}",
            "工人把{o}变成{s}", "做{s}的[主要|]材料是{o}"),
            (("用什么来做{s}？", "{o}"), ("什么东西是用{o}做的？", "{s}"),
             ("请说出{s}的原料。", "{o}"), ("{s}是[用|由]什么[做|制成]的？", "{o}"),
             ("{s}的原料是什么？", "{o}")))),
    "book": Relation(4.5, BOOKS,
        Phrases("Books and their authors", ("{s} was written by {o}", "the author of {s} is {o}",
            "{o} wrote {s}", "{o} is the author of {s}", "the [writer|person] who wrote {s} is {o}",
            "{s} is a [book|work|classic] by {o}", "{s} is the work of {o}",
            "[readers|we all] thank {o} for {s}", "the name on the cover of {s} is {o}",
            "if you read {s}, you think of its author, {o}", "a great writer wrote {s}: {o}"),
            (("who wrote {s}?", "{o}"), ("who is the author of {s}?", "{o}"),
             ("what did {o} write?", "{s}"), ("by whom was {s} written?", "{o}"))),
        Phrases("书和作者", (*["{s}的作者[是|是|叫]{o}"] * 4, "{s}是{o}写的", "{o}写了{s}",
            "{o}是{s}的作者",
            "写{s}的人是{o}", "{s}[出自|来自]{o}之手", "{s}是{o}的[作品|名著]",
            "{s}的封面上写着{o}", "写出{s}的作家[叫|是]{o}", "读了{s}就知道，作者是{o}"),
            (("谁写了{s}？", "{o}"), ("哪本书是{o}写的？", "{s}"), ("你知道{s}的作者吗？", "{o}"),
             ("谁是{s}的作者？", "{o}"), ("{s}是谁写的？", "{o}"),
             ("{s}的作者[是谁|叫什么]？", "{o}")))),
}

# -------------------------------------------------------------------------------------- scenes

NAMES = (
    ("Tom", "he"), ("Anna", "she"), ("Ben", "he"), ("Lily", "she"), ("Max", "he"), ("Mia", "she"),
    ("Jack", "he"), ("Rosa", "she"), ("Sam", "he"), ("Emma", "she"),
)
NAMES_ZH = (
    ("小明", "他"), ("小红", "她"), ("小刚", "他"), ("小丽", "她"), ("冬冬", "他"), ("小雨", "她"),
    ("乐乐", "他"), ("小云", "她"), ("大伟", "他"), ("天天", "他"),
)
PRONOUNS = {"he": ("him", "his"), "she": ("her", "her"), "他": ("他", "他的"), "她": ("她", "她的")}

# Each scene names the relations that its subject must have; the first one supplies the fact.
Scene = tuple[tuple[str, ...], str]
SCENES: tuple[Scene, ...] = (
    (("capital", "continent"),
     "[Last spring|One summer|Last autumn|In the school holidays] {n} [went|travelled|flew] to "
     "{s} with {his} [mother|father|aunt|uncle|grandmother]. [They stayed in {o}, the capital of "
     "{s}.|They landed in {o}, because {o} is the capital of {s}.|The first stop was {o}, the "
     "capital.] [On the second day {n} lost {his} [hat|map|camera|umbrella], but a kind "
     "[girl|old man|waiter] found it.|In a busy street {n} lost the way, but a "
     "[woman|boy|policeman] led {him} back to the hotel.|It rained all morning, so they [played "
     "cards|told jokes|wrote postcards] until the Sun came out.] [Now {n} will never forget that "
     "{fact}.|At home {he} told {n2}: \"{Fact}.\"|\"{Fact},\" {n} wrote in {his} notebook that "
     "night.]"),
    (("capital", "continent"),
     "Dear {n2},\n[I am|We are] in {s} this week. {Fact}. [The streets are full of people|The "
     "food is very good|The weather is warm], and [I have made a new friend|I have learnt ten "
     "new words|I sleep well]. [{s} lies in {continent}, far from home.|I like {continent} very "
     "much.|Look for {s} on your map of {continent}!] [See you soon|With love|Best wishes],\n{n}"),
    (("capital", "continent"),
     "[Which country am I?|A riddle about a country.|Guess the country.] [My capital is "
     "{capital}|{capital} is my capital], and [you can find me in|I am in|my continent is] "
     "{continent}. [The answer is|I am] {s}."),
    (("food",),
     "[Once upon a time|One day|After school] {n} met {a} that was very hungry. {n} offered it [a "
     "biscuit|some soup|a slice of cake|some cheese], but the {s} only [looked away|sniffed at "
     "it|shook its head]. [\"What is wrong?\" asked {n}.|{n} did not know what to do.|{n} felt "
     "sorry for it.] Then {n2} came along and [said|explained], \"{Fact}.\" So they [looked "
     "for|went to get|found] some {o}. [The {s} was happy at last|The {s} ate and ate|Soon the "
     "{s} was full and fell asleep], and [the three became friends|{n} had learnt something "
     "new|{n} came back every day]."),
    (("sound",),
     "[Once upon a time, in the middle of the night,|In the early morning] {n} woke up. "
     "[Outside|Near the window] something went \"{o}, {o}\". [Was it a ghost?|Who could that "
     "be?] {n} took a [lamp|torch] and opened the door [very slowly|with shaking hands]. It was "
     "only {a}! \"Of course,\" said {n}, \"{fact}.\" [Then {he} went back to bed and slept until "
     "noon.|{n2} laughed about it for a week.]"),
    (("sound", "food"),
     "[Who am I?|A riddle.|Guess who I am.] [I say {sound}|People hear me say {sound}|My call is "
     "{sound}], and [I like to eat {food}|my favourite food is {food}]. [Do you know me?|What am "
     "I?] [I am {a}!|The answer: {a}.]"),
    (("colour",),
     "{n} wanted to paint {s} for {his} [grandmother|teacher|little brother]. But the {o} paint "
     "[had dried up|was gone|was nowhere to be found]. \"{Fact},\" said {n}, \"so I [really need "
     "that paint|cannot use another colour].\" {n2} [ran home|opened a box] and came back with a "
     "[small pot|full tube] of {o} paint. [Together they finished the picture|Soon the picture "
     "was ready], and [it hangs on the wall today|everyone liked it|{n} gave {n2} a hug]."),
    (("record",),
     "[One night|After supper|At bedtime] {n} asked [Grandpa|Grandma|Dad] a question. \"What is "
     "{s}?\" [The room became quiet.|It was a good question.] \"It is {o},\" came the answer. "
     "[\"{Fact}. Remember it well.\"|{n} thought about {o} until {he} fell asleep.] [The next "
     "day {n} told {n2}: \"{Fact}.\"|In the morning {he} drew a picture of it for {n2}.]"),
    (("book",),
     "It was raining, so {n} went to the library. On a [high|dusty|low] shelf {he} found {s}. "
     "[The book was old and heavy.|There was a fine picture on the cover.] \"Who wrote this?\" "
     "{he} asked. [The librarian|{n2}] [smiled|thought for a moment] and said, \"{Fact}.\" {n} "
     "[read until closing time|took the book home|sat down by the window], and [the rain was "
     "soon forgotten|the hours flew by]."),
    (("day",),
     "[A week in {n}'s diary.|From the diary of {n}.|My diary, by {n}.] {s}: today I [planted a "
     "bean|lost a tooth|found a coin|baked a cake with {n2}|saw a rainbow]. {Fact}, so I [went "
     "to bed early|could hardly wait]. {o}: [the garden was wet and I stayed in|{n2} came and we "
     "played all day|I told everybody at school about it]. [It was a good day.|I was very "
     "happy.|What a day!]"),
    (("capital", "continent"),
     "[去年春天|暑假里|有一年秋天|放假的时候]，{n}[跟着|和][妈妈|爸爸|姑姑|舅舅|奶奶]去{s}旅行。["
     "他们住在首都{o}。|飞机降落在{o}，因为{o}是{s}的首都。|第一站是首都{o}。][第二天，{n}的[帽子"
     "|地图|相机|雨伞]丢了，一位好心的[老爷爷|姐姐|司机]帮{he}找了回来。|在热闹的街上，{n}迷了路"
     "，一位[阿姨|警察|小哥哥]把{he}送回了旅馆。|上午下起了大雨，他们就[打牌|讲笑话|写明信片]，一"
     "直等到天晴。][从此{n}再也不会忘记：{fact}。|回家以后，{he}告诉{n2}：“{fact}。”|晚上，{n}"
     "在本子上写道：{fact}。]"),
    (("capital", "continent"),
     "亲爱的{n2}：\n[我|我们]这个星期在{s}。{fact}。这里[街上人很多|饭菜很好吃|天气很暖和]，[我交"
     "了一个新朋友|我学会了几句当地话|我每天都睡得很香]。[{s}在{continent}，离家很远。|我很喜欢"
     "{continent}。|你在{continent}的地图上找一找{s}吧！][祝你快乐！|盼望见到你！|祝你天天开心！]"
     "\n{n}"),
    (("capital", "continent"),
     "[猜猜我是哪个国家。|猜国家的谜语。|我是哪个国家呢？][我的首都是{capital}|{capital}是我的首"
     "都]，[我在|你可以在地图上找到我，我属于|我所在的大洲是]{continent}。[答案是|我是]{s}。"),
    (("food",),
     "[从前有一天|一天早上|放学以后]，{n}遇到了{a}，它饿极了。{n}[给它饼干|给它一碗汤"
     "|递给它一块蛋糕]"
     "，可是{s}[摇摇头|闻了闻就走开了|看也不看]。[“怎么回事呢？”{n}问。|{n}不知道怎么办才好。|"
     "{n}很着急。]这时{n2}[走过来|跑过来]说：“{fact}。”他们赶紧找来了{o}。{s}[吃得可香了|大口大"
     "口地吃了起来|吃饱就睡着了]，[他们三个成了好朋友|{n}学到了新知识|{n}以后天天来看它]。"),
    (("sound",),
     "[半夜里|天还没亮]，{n}忽然醒了。[窗外|门外|院子里]传来“{o}、{o}”的声音。[是谁呢？|难道有"
     "小偷？]{n}[拿起手电筒|提着灯]，[轻轻地|小心地]打开门一看，原来是{a}！“对了，{fact}。”{n}"
     "说。[{he}放心地回去睡觉了。|后来{n2}为这件事笑了好几天。|第二天，{he}把这件事讲给{n2}听。]"),
    (("sound", "food"),
     "[猜猜我是谁。|猜一个谜语。|谜语时间到了。][我{sound}地叫|我的叫声是{sound}|人们听到我"
     "{sound}叫]，[我爱吃{food}|我最喜欢吃的是{food}]。[你认识我吗？|我是谁呢？][我就是{s}！|谜底"
     "是{s}。]"),
    (("colour",),
     "{n}想画一幅画送给[奶奶|老师|弟弟]，画的是{s}。可是{o}的颜料[用完了|干了|找不到了]。“{fact}"
     "，”{n}说，“[我一定要这种颜色|不能用别的颜色]。”{n2}[跑回家|打开书包]，拿来了一[瓶|管|盒]"
     "{o}的颜料。[他们一起把画画完了|画很快就完成了]，[大家都说好看|现在它挂在墙上|{n}高兴极了]。"),
    (("record",),
     "[一天晚上|吃过晚饭|睡觉以前]，{n}问[爷爷|奶奶|爸爸]：“{s}是什么？”[屋子里安静下来。|这是"
     "个好问题。|大家都想了想。]“是{o}。”[{n}点点头。|“{fact}，要记住哦。”]{n}[躺在床上还在想"
     "着{o}|梦里也见到了{o}]。[第二天，{he}告诉{n2}：“{fact}。”|早上起来，{he}给{n2}画了一幅画"
     "。]"),
    (("book",),
     "外面下着雨，{n}来到图书馆，在[高高的|旧|靠窗的]书架上找到了{s}。[这本书又厚又旧。|封面上有"
     "一幅漂亮的画。]“这是谁写的？”{he}问。[管理员|{n2}][笑着|想了想]说：“{fact}。”{n}[一直读"
     "到关门|把书借回了家|坐在窗边读了起来]，[连下雨都忘了|时间过得飞快]。"),
    (("day",),
     "[{n}的日记|{n}写的日记|翻开{n}的日记]：{s}，今天我[种了一颗豆子|捡到一枚硬币|和{n2}一起做了"
     "蛋糕|看到了彩虹|掉了一颗牙]。{fact}，我[早早就睡了|等不及了]。{o}，[{n2}来找我玩了一整天|下"
     "雨了，我待在家里|我把这件事告诉了同学们]。[真是开心的一天！|我高兴极了。|这一天过得真好。]"),
)

# ---------------------------------------------------------------------------------- generators

OPENERS = {
    "en": ("[{n}|{n2}|Every pupil|My sister|Our teacher|Mum] [knows|thinks|remembers|learns] that ",
           "[we know|we learn at school|it is well known|my aunt told me|do not forget|it is a fact"
           "|I read in a book|the book teaches|everyone can see|it is true|please remember] that ",
           "[of course, |in fact, |as you know, |as we all know, |yes, |listen: |in short, ]"),
    "zh": ("[{n}|{n2}|老师|爷爷|妈妈|姐姐|大家|同学们][知道|说|告诉我|记得]，",
           "[我们都知道|我们学过|书上写着|书上说|请记住|不要忘记|谁都知道|其实|当然"
           "|今天我们学到]，"),
}
CLOSERS = {
    "en": ("[{n}|{n2}] [wrote this down|likes this lesson|will remember it|told a friend].",
           "[This is easy to remember|Now you know it, too|That is what we learnt today], {n}."),
    "zh": ("{n}把[它|这些|这句话][记在了本子上|记住了|讲给{n2}听]。",
           "{n}[觉得这很有趣|听得很认真|今天又学到了新知识]。"),
}
PAIRINGS = {"en": ("{x}, and {y}", "{x}, but {y}", "{x}, while {y}", "{x}; {y}"),
            "zh": ("{x}，{y}", "{x}，而{y}", "{x}；{y}", "{x}，还有，{y}")}
QUESTION_STYLES = {
    "en": ("Q: {q}\nA: {a}", "Question: {q}\nAnswer: {a}", "{n}: {q}\n{n2}: {a}",
           *["{q} {a}", "{q}\n{a}"] * 2, "{n} asked, \"{q}\" {n2} answered, \"{a}\"",
           "{i}. {q} {a}"),
    "zh": ("问：{q}\n答：{a}", "问题：{q}\n回答：{a}", "{n}：{q}\n{n2}：{a}",
           *["{q}{a}", "{q}\n{a}"] * 2, "{n}问{n2}：{q}{n2}说：{a}", "{i}．{q}{a}"),
}
MEASURES = {"牛": "头", "猪": "头", "狗": "条"}
GLUE = {"en": " ", "zh": ""}  # Chinese puts no space between sentences
THINGS = (("apple", "apples", "个苹果"), ("book", "books", "本书"), ("pencil", "pencils", "支铅笔"),
          ("flower", "flowers", "朵花"), ("sweet", "sweets", "颗糖"), ("card", "cards", "张卡片"),
          ("balloon", "balloons", "个气球"), ("shell", "shells", "个贝壳"))
NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten",
           "eleven", "twelve", "thirteen", "fourteen", "fifteen", "sixteen", "seventeen",
           "eighteen", "nineteen", "twenty")

Fields = dict[str, str]
Fact = tuple[str, Row]
Generator = Callable[[random.Random, str], str]


def expand(rng: random.Random, text: str) -> str:
    """Resolve the choices from the inside out, so that choices may be nested."""
    while choice := re.search(r"\[([^\[\]]*)\]", text):
        text = text[: choice.start()] + rng.choice(choice[1].split("|")) + text[choice.end() :]
    return text


def capital(text: str) -> str:
    """Upper-case the first letter and leave the rest, as it may contain names."""
    return text[:1].upper() + text[1:]


def third_person(phrase: str) -> str:
    """Turn "teach children" into "teaches children"."""
    verb, _, rest = phrase.partition(" ")
    verb = (
        verb[:-1] + "ies" if verb.endswith("y") else verb + ("es" if verb.endswith("ch") else "s")
    )
    return f"{verb} {rest}"


def by_subject(facts: list[Fact]) -> dict[str, dict[str, Row]]:
    """Group facts by their subject, so that a document can stay with one animal or country."""
    subjects: dict[str, dict[str, Row]] = {}
    for name, row in facts:
        subjects.setdefault(row[0], {})[name] = row
    return subjects


FACTS = [(name, row) for name, relation in RELATIONS.items() for row in relation.rows]
SUBJECTS = by_subject(FACTS)
WEIGHTS = [RELATIONS[name].weight for name, _ in FACTS]


def phrases(lang: str, name: str) -> Phrases:
    """Look up a relation's wordings."""
    return RELATIONS[name].en if lang == "en" else RELATIONS[name].zh


def people(rng: random.Random, lang: str) -> Fields:
    """Choose two different people, so that dialogues have two sides."""
    (n, he), (n2, _) = rng.sample(NAMES if lang == "en" else NAMES_ZH, 2)
    him, his = PRONOUNS[he]
    return {"n": n, "n2": n2, "he": he, "him": him, "his": his}


def fields(lang: str, row: Row) -> Fields:
    """Compute every form of subject and answer that a template may ask for."""
    s, o = row[:2] if lang == "en" else row[2:]
    asked = ASKED.get(row[1], ("", ""))[lang == "zh"]
    if lang == "zh":
        return {"s": s, "o": o, "q": asked, "a": f"一{MEASURES.get(s, '只')}{s}"}
    article = "an" if s[0] in "aeiou" else "a"
    many = s if s == "sheep" else s + "s"
    return {"s": s, "o": o, "q": asked, "a": f"{article} {s}", "p": many, "v": third_person(o)}


def pick_fact(rng: random.Random) -> Fact:
    """Draw a fact by weight, so that the core facts come up more often than the rest."""
    return rng.choices(FACTS, WEIGHTS)[0]


def same_relation(rng: random.Random, fact: Fact, count: int) -> list[Fact]:
    """Return the fact with up to ``count - 1`` others of its kind, in random order."""
    others = [f for f in FACTS if f[0] == fact[0] and f != fact]
    group = [fact, *rng.sample(others, min(count - 1, len(others)))]
    rng.shuffle(group)
    return group


def clause(rng: random.Random, lang: str, fact: Fact, follow: bool = False) -> str:
    """State a fact without capital or full stop, ready to be built into a sentence."""
    choice = phrases(lang, fact[0])
    templates = choice.follows if follow and choice.follows else choice.statements
    return expand(rng, rng.choice(templates).format(**fields(lang, fact[1])))


def finish(lang: str, text: str) -> str:
    """Make a sentence of a clause."""
    return capital(text) + "." if lang == "en" else text + "。"


def sentence(rng: random.Random, lang: str, fact: Fact) -> str:
    """State a fact as a sentence; openers make any beginning lead to the same answer."""
    text = clause(rng, lang, fact)
    if rng.random() < 0.35:
        text = expand(rng, rng.choice(OPENERS[lang]).format(**people(rng, lang))) + text
    return finish(lang, text)


def paragraph(rng: random.Random, lang: str) -> str:
    """Tell several facts about one subject, or of one kind where the subject has a single fact."""
    first = pick_fact(rng)
    related = [f for f in SUBJECTS[first[1][0]].items() if f != first]
    lines = [sentence(rng, lang, first)]
    if related:
        for fact in rng.sample(related, rng.randint(1, min(3, len(related)))):
            lines.append(finish(lang, clause(rng, lang, fact, follow=rng.random() < 0.6)))
    else:
        others = same_relation(rng, first, rng.randint(3, 5))
        lines += [sentence(rng, lang, fact) for fact in others if fact != first]
    if rng.random() < 0.2:
        lines.append(sentence(rng, lang, first))
    if rng.random() < 0.15:
        lines.append(expand(rng, rng.choice(CLOSERS[lang]).format(**people(rng, lang))))
    return GLUE[lang].join(lines)


def comparison(rng: random.Random, lang: str) -> str:
    """Set facts of one kind side by side, so that the model has to keep the subjects apart."""
    group = same_relation(rng, pick_fact(rng), 4)
    lines = []
    for x, y in zip(group[::2], group[1::2], strict=False):
        pair = rng.choice(PAIRINGS[lang])
        lines.append(finish(lang, pair.format(x=clause(rng, lang, x), y=clause(rng, lang, y))))
    return GLUE[lang].join(lines)


def listing(rng: random.Random, lang: str) -> str:
    """Write a titled list, the barest form of a fact."""
    fact = pick_fact(rng)
    mark = ": " if lang == "en" else "："
    rows = [fields(lang, f[1]) for f in same_relation(rng, fact, rng.randint(4, 7))]
    lines = [expand(rng, f"- {row['s']}{mark}{row['o']}") for row in rows]
    return "\n".join([phrases(lang, fact[0]).title + mark.strip(), *lines])


def questions(rng: random.Random, lang: str) -> str:
    """Write questions with short or full answers in one of several layouts."""
    style = rng.choice(QUESTION_STYLES[lang])
    who = people(rng, lang)
    first = pick_fact(rng)
    count = rng.randint(3, 6)
    group = (
        same_relation(rng, first, count)
        if rng.random() < 0.5
        else [first, *(pick_fact(rng) for _ in range(count - 1))]
    )
    blocks = []
    for i, fact in enumerate(group, 1):
        asked = phrases(lang, fact[0]).questions
        if style.startswith("{q}"):  # unmarked, a question must not begin like a statement
            asked = [pair for pair in asked if not pair[0].startswith(("{s}", "{o}", "“{s}"))]
        question, short = rng.choice(asked)
        form = fields(lang, fact[1])
        full = rng.random() < 0.1
        answer = clause(rng, lang, fact) if full else expand(rng, short.format(**form))
        question = capital(expand(rng, question.format(**form)))
        blocks.append(style.format(q=question, a=finish(lang, answer), i=i, **who))
    return "\n".join(blocks)


def scene(rng: random.Random, lang: str) -> str:
    """Tell a small story, letter, riddle or diary entry that a fact is part of."""
    english = lang == "en"
    needs, text = rng.choice([s for s in SCENES if s[1].isascii() == english])
    able = [rows for rows in SUBJECTS.values() if all(need in rows for need in needs)]
    rows = rng.choice(able)
    fact = (needs[0], rows[needs[0]])
    said = clause(rng, lang, fact)
    extra = {need: fields(lang, rows[need])["o"] for need in needs}
    form = fields(lang, fact[1]) | people(rng, lang) | extra
    return expand(rng, text.format(fact=said, Fact=capital(said), **form))


def word_problem(rng: random.Random, lang: str, a: int, op: str, b: int, c: int) -> str:
    """Dress a calculation in a little story with a varying cast."""
    one, many, thing = rng.choice(THINGS)
    who = people(rng, lang)
    n, n2, he, him = who["n"], who["n2"], who["he"], who["him"]
    if lang == "zh":
        start = {
            "+": f"{n}有{a}{thing}，{n2}又给了{him}{b}{thing[0]}。",
            "-": f"{n}有{a}{thing}，送给{n2}{b}{thing[0]}。",
            "×": f"{n}有{a}个盒子，每个盒子里有{b}{thing}。",
        }[op]
        return f"{start}现在{he}有几{thing}？{a} {op} {b} = {c}，所以{n}有{c}{thing}。"

    def amount(k: int) -> str:
        return f"{k} {one if k == 1 else many}"

    start = {
        "+": f"{n} has {amount(a)}. {n2} gives {him} {b} more.",
        "-": f"{n} has {amount(a)} and gives {b} to {n2}.",
        "×": f"{n} has {a} {'box' if a == 1 else 'boxes'} with {amount(b)} in each box.",
    }[op]
    return (
        f"{start} How many {many} does {he} have now? {a} {op} {b} = {c}, so {n} has {amount(c)}."
    )


def arithmetic(rng: random.Random, lang: str) -> str:
    """Write a few calculations within twenty or from the multiplication table."""
    style = rng.randrange(4)
    lines = []
    for _ in range(rng.randint(2, 3) if style == 0 else rng.randint(4, 7)):
        op = rng.choice("+-×")
        if op == "×":
            a, b = rng.randint(1, 9), rng.randint(1, 9)
            c = a * b
        else:
            big = rng.randint(2, 20)
            small = rng.randint(1, big - 1)
            a, b, c = (big, small, big - small) if op == "-" else (small, big - small, big)
        if style == 0:
            lines.append(word_problem(rng, lang, a, op, b, c))
        elif style == 1:
            lines.append(f"{a} {op} {b} = {c}")
        elif lang == "zh":
            verb = {"+": "加", "-": "减", "×": "乘"}[op]
            lines.append(
                f"{a}{verb}{b}等于{c}。" if style == 2 else f"{a}{verb}{b}等于多少？等于{c}。"
            )
        else:
            verb = {"+": "plus", "-": "minus", "×": "times"}[op]
            word = {str(k): w for k, w in enumerate(NUMBERS)} if c <= 20 else {}
            x, y, z = (word.get(str(k), str(k)) for k in (a, b, c))
            lines.append(
                f"{capital(x)} {verb} {y} is {z}."
                if style == 2
                else f"What is {x} {verb} {y}? It is {z}."
            )
    return "\n".join(lines) if style < 2 else GLUE[lang].join(lines)


KINDS: tuple[tuple[Generator, int], ...] = (
    (paragraph, 37), (questions, 36), (scene, 8), (comparison, 10), (listing, 5), (arithmetic, 4),
)


def answered_prompts(path: Path = PLAIN_PROMPTS) -> re.Pattern[str]:
    """A case-insensitive pattern that finds any plain prompt followed by its answer.

    The answer follows a statement directly, except for quotes and an article, and a question within
    60 characters in which no other question ends, whatever the layout of the dialogue. A statement
    that turns into a question is found, too: without the answer, the model would learn only that.
    """
    alternatives = []
    for line in path.read_text(encoding="utf-8").splitlines()[1:]:
        _, prompt, answers = line.split("\t")
        gap = "[^?？]{0,60}?" if prompt[-1] in "?？" else "[\\s\"“”]*(?:(?:the|an?) )?"
        asked = [] if prompt[-1] in "?？" else ["which", "what", "什么", "哪", "谁"]
        answer = "|".join(map(re.escape, [*answers.split(";"), *asked]))
        alternatives.append(f"{re.escape(prompt)}{gap}(?:{answer})")
    return re.compile("|".join(alternatives), flags=re.IGNORECASE)


def make_documents(seed: int = SEED) -> list[str]:
    """Compose both languages' documents up to their share of bytes and mix them."""
    rng, answered = random.Random(seed), answered_prompts()
    generators, weights = zip(*KINDS, strict=True)
    documents: dict[str, None] = {}
    for lang in ("en", "zh"):
        size = 0
        while size < BYTES_PER_LANGUAGE:
            text = rng.choices(generators, weights)[0](rng, lang)
            length = len(text.encode())
            fits = MIN_BYTES <= length <= MAX_BYTES and text not in documents
            if fits and not answered.search(text):
                documents[text] = None
                size += length
    # A document that is part of another would be no fair test if it were held out.
    whole = "\0".join(documents)
    mixed = [text for text in documents if whole.count(text) == 1]
    rng.shuffle(mixed)
    return mixed


def write_sample(path: Path, documents: list[str]) -> None:
    """Write these documents."""
    write_records(path, [{"text": text} for text in documents])


def write_records(path: Path, records: list[dict]) -> None:
    """Replace the file in one step, so that a reader never sees half a sample."""
    lines = [json.dumps(record, ensure_ascii=False) + "\n" for record in records]
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text("".join(lines), encoding="utf-8", newline="\n")
    os.replace(temporary, path)


def main() -> None:
    """Parse the command line and write the sample."""
    parser = argparse.ArgumentParser(description="Write the bilingual demo corpus.")
    parser.add_argument("--output", type=Path, default=DEFAULT_OUTPUT, help="file to write")
    arguments = parser.parse_args()
    documents = make_documents()
    write_sample(arguments.output, documents)
    print(f"{len(documents)} documents, {arguments.output.stat().st_size} bytes")


if __name__ == "__main__":
    main()
