"""Write the small bilingual corpus that the demo trains on.

The sample states a small world of true, commonplace facts in English and Chinese, each fact many
times and in many wordings, so that a tiny model can learn the fact itself and not one sentence.

Templates are written in a mini-notation: ``{name}`` is a field and ``[a|b|c]`` a free choice.
Clauses start in lower case and carry no full stop, so that they fit into longer sentences.
"""

import argparse
import json
import os
import random
import re
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

SEED = 20240607
BYTES_PER_LANGUAGE = 605_000
MIN_BYTES, MAX_BYTES = 80, 900
DEFAULT_OUTPUT = Path(__file__).resolve().parent / "pretrain_sample.jsonl"

# --------------------------------------------------------------------------------------- facts

# English, Chinese, then pairs: capital, continent, landmark, language ("" where it is not simple).
COUNTRIES = (
    ("China", "中国", "Beijing", "北京", "Asia", "亚洲", "the Great Wall", "长城", "Chinese", "汉语"),
    ("Japan", "日本", "Tokyo", "东京", "Asia", "亚洲", "Mount Fuji", "富士山", "Japanese", "日语"),
    ("India", "印度", "New Delhi", "新德里", "Asia", "亚洲", "the Taj Mahal", "泰姬陵", "", ""),
    ("Thailand", "泰国", "Bangkok", "曼谷", "Asia", "亚洲", "the Grand Palace", "大皇宫", "Thai", "泰语"),
    ("France", "法国", "Paris", "巴黎", "Europe", "欧洲", "the Eiffel Tower", "埃菲尔铁塔",
     "French", "法语"),
    ("Britain", "英国", "London", "伦敦", "Europe", "欧洲", "Big Ben", "大本钟", "English", "英语"),
    ("Germany", "德国", "Berlin", "柏林", "Europe", "欧洲", "the Brandenburg Gate", "勃兰登堡门",
     "German", "德语"),
    ("Italy", "意大利", "Rome", "罗马", "Europe", "欧洲", "the Colosseum", "斗兽场",
     "Italian", "意大利语"),
    ("Spain", "西班牙", "Madrid", "马德里", "Europe", "欧洲", "the Sagrada Familia", "圣家堂",
     "Spanish", "西班牙语"),
    ("Greece", "希腊", "Athens", "雅典", "Europe", "欧洲", "the Parthenon", "帕特农神庙",
     "Greek", "希腊语"),
    ("Egypt", "埃及", "Cairo", "开罗", "Africa", "非洲", "the Great Pyramid", "大金字塔",
     "Arabic", "阿拉伯语"),
    ("Kenya", "肯尼亚", "Nairobi", "内罗毕", "Africa", "非洲", "", "", "", ""),
    ("Canada", "加拿大", "Ottawa", "渥太华", "North America", "北美洲", "", "", "", ""),
    ("Brazil", "巴西", "Brasilia", "巴西利亚", "South America", "南美洲",
     "Sugarloaf Mountain", "面包山", "Portuguese", "葡萄牙语"),
    ("Peru", "秘鲁", "Lima", "利马", "South America", "南美洲", "Machu Picchu", "马丘比丘", "", ""),
    ("Australia", "澳大利亚", "Canberra", "堪培拉", "Oceania", "大洋洲",
     "the Sydney Opera House", "悉尼歌剧院", "English", "英语"),
)

# English, Chinese, then pairs: sound, food, young, home.
ANIMALS = (
    ("cat", "猫", "meow", "喵喵", "fish", "鱼", "kitten", "", "", ""),
    ("dog", "狗", "woof", "汪汪", "bones", "骨头", "puppy", "", "in a kennel", "狗窝里"),
    ("cow", "牛", "moo", "哞哞", "grass", "青草", "calf", "牛犊", "in a barn", "牛棚里"),
    ("sheep", "绵羊", "baa", "咩咩", "", "", "lamb", "羊羔", "", ""),
    ("horse", "马", "neigh", "咴咴", "hay", "干草", "foal", "马驹", "in a stable", "马厩里"),
    ("pig", "猪", "oink", "哼哼", "", "", "piglet", "猪崽", "in a sty", "猪圈里"),
    ("chicken", "鸡", "cluck", "咯咯", "grain", "谷粒", "chick", "小鸡", "in a coop", "鸡舍里"),
    ("duck", "鸭子", "quack", "嘎嘎", "", "", "duckling", "", "by the pond", "池塘边"),
    ("frog", "青蛙", "croak", "呱呱", "insects", "虫子", "tadpole", "蝌蚪", "", ""),
    ("bee", "蜜蜂", "buzz", "嗡嗡", "nectar", "花蜜", "", "", "in a hive", "蜂巢里"),
    ("panda", "大熊猫", "", "", "bamboo", "竹子", "", "", "in a bamboo forest", "竹林里"),
    ("rabbit", "兔子", "", "", "carrots", "胡萝卜", "", "", "in a burrow", "地洞里"),
    ("monkey", "猴子", "", "", "bananas", "香蕉", "", "", "in the trees", "树上"),
    ("lion", "狮子", "", "", "meat", "肉", "cub", "幼狮", "on the grassland", "草原上"),
    ("kangaroo", "袋鼠", "", "", "", "", "joey", "", "in Australia", "澳大利亚"),
    ("camel", "骆驼", "", "", "", "", "", "", "in the desert", "沙漠里"),
    ("squirrel", "松鼠", "", "", "nuts", "坚果", "", "", "in a hollow tree", "树洞里"),
    ("silkworm", "蚕", "", "", "mulberry leaves", "桑叶", "", "", "", ""),
    ("polar bear", "北极熊", "", "", "seals", "海豹", "", "", "in the Arctic", "北极"),
)

# English, Chinese, then pairs: task, place of work.
JOBS = (
    ("teacher", "老师", "teach children", "教学生", "in a school", "学校"),
    ("doctor", "医生", "treat sick people", "给人看病", "in a hospital", "医院"),
    ("farmer", "农民", "grow crops", "种庄稼", "in the fields", "田里"),
    ("baker", "面包师", "bake bread", "烤面包", "in a bakery", "面包房"),
    ("firefighter", "消防员", "put out fires", "灭火", "in a fire station", "消防站"),
    ("pilot", "飞行员", "fly planes", "开飞机", "in a cockpit", "驾驶舱"),
    ("tailor", "裁缝", "sew clothes", "做衣服", "in a tailor's shop", "裁缝铺"),
    ("carpenter", "木匠", "make furniture", "做家具", "in a workshop", "木工房"),
    ("mail carrier", "邮递员", "deliver letters", "送信", "in a post office", "邮局"),
    ("cook", "厨师", "cook meals", "做饭", "in a kitchen", "厨房"),
    ("painter", "画家", "paint pictures", "画画", "in a studio", "画室"),
    ("fisherman", "渔夫", "catch fish", "捕鱼", "on a boat", "船上"),
)

# From here on the rows are: English subject, English answer, Chinese subject, Chinese answer.
COLOURS = (
    ("a banana", "yellow", "香蕉", "黄色"),
    ("grass", "green", "小草", "绿色"),
    ("the clear sky", "blue", "晴朗的天空", "蓝色"),
    ("snow", "white", "雪", "白色"),
    ("coal", "black", "煤", "黑色"),
    ("a strawberry", "red", "草莓", "红色"),
    ("a carrot", "orange", "胡萝卜", "橙色"),
    ("an eggplant", "purple", "茄子", "紫色"),
    ("a lemon", "yellow", "柠檬", "黄色"),
    ("a cucumber", "green", "黄瓜", "绿色"),
    ("a pumpkin", "orange", "南瓜", "橙色"),
    ("milk", "white", "牛奶", "白色"),
)
OPPOSITE_PAIRS = (
    ("big", "small", "大", "小"),
    ("hot", "cold", "热", "冷"),
    ("fast", "slow", "快", "慢"),
    ("wet", "dry", "湿", "干"),
    ("full", "empty", "满", "空"),
    ("long", "short", "长", "短"),
    ("heavy", "light", "重", "轻"),
    ("happy", "sad", "高兴", "难过"),
    ("early", "late", "早", "晚"),
    ("strong", "weak", "强", "弱"),
)
DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
DAYS_ZH = ("星期一", "星期二", "星期三", "星期四", "星期五", "星期六", "星期天")
MONTHS = ("January", "February", "March", "April", "May", "June", "July", "August", "September",
          "October", "November", "December")
MONTHS_ZH = ("一月", "二月", "三月", "四月", "五月", "六月", "七月", "八月", "九月", "十月",
             "十一月", "十二月")
SEASONS, SEASONS_ZH = ("spring", "summer", "autumn", "winter"), ("春天", "夏天", "秋天", "冬天")
BODY = (
    ("eyes", "see", "眼睛", "看东西"),
    ("ears", "hear", "耳朵", "听声音"),
    ("nose", "smell", "鼻子", "闻气味"),
    ("tongue", "taste", "舌头", "尝味道"),
    ("teeth", "chew", "牙齿", "嚼食物"),
    ("legs", "walk", "腿", "走路"),
    ("brain", "think", "大脑", "思考"),
    ("lungs", "breathe", "肺", "呼吸"),
)
RECORDS = (
    ("the largest planet of the solar system", "Jupiter", "太阳系里最大的行星", "木星"),
    ("the planet closest to the Sun", "Mercury", "离太阳最近的行星", "水星"),
    ("the planet farthest from the Sun", "Neptune", "离太阳最远的行星", "海王星"),
    ("the planet that we call the red planet", "Mars", "人们说的红色行星", "火星"),
    ("the planet with the brightest rings", "Saturn", "光环最亮的行星", "土星"),
    ("the planet that we live on", "Earth", "我们居住的行星", "地球"),
    ("the highest mountain in the world", "Mount Everest", "世界上最高的山峰", "珠穆朗玛峰"),
    ("the largest ocean in the world", "the Pacific", "世界上最大的海洋", "太平洋"),
    ("the largest country in the world", "Russia", "世界上面积最大的国家", "俄罗斯"),
    ("the longest river in China", "the Yangtze", "中国最长的河流", "长江"),
    ("the tallest animal in the world", "the giraffe", "世界上最高的动物", "长颈鹿"),
    ("the largest animal in the sea", "the blue whale", "海洋里最大的动物", "蓝鲸"),
    ("the fastest animal on land", "the cheetah", "陆地上跑得最快的动物", "猎豹"),
)
SYMBOLS = (
    ("gold", "Au", "金", "Au"),
    ("silver", "Ag", "银", "Ag"),
    ("iron", "Fe", "铁", "Fe"),
    ("copper", "Cu", "铜", "Cu"),
    ("oxygen", "O", "氧", "O"),
    ("carbon", "C", "碳", "C"),
)
# The space in an answer separates the number from what is counted.
COUNTS = (
    ("a week", "seven days", "一个星期", "七 天"),
    ("a year", "twelve months", "一年", "十二 个月"),
    ("a day", "twenty-four hours", "一天", "二十四 个小时"),
    ("an hour", "sixty minutes", "一个小时", "六十 分钟"),
    ("a spider", "eight legs", "一只蜘蛛", "八 条腿"),
    ("an ant", "six legs", "一只蚂蚁", "六 条腿"),
    ("a bird", "two legs", "一只小鸟", "两 条腿"),
    ("a triangle", "three sides", "一个三角形", "三 条边"),
    ("a square", "four sides", "一个正方形", "四 条边"),
)
# Every row is a sentence of its own kind here, so the subject carries the wordings.
NATURE = (
    ("[water freezes at|the freezing point of water is|water turns into ice at|ice forms at"
     "|if water gets as cold as ice, it is at|a puddle freezes when the air is at]",
     "zero degrees Celsius",
     "[水结冰的温度是|水的冰点是|水变成冰的温度是|让水结冰需要|水开始结冰是在|冰水的温度大约是]", "零摄氏度"),
    ("[water boils at|the boiling point of water is|water turns into steam at"
     "|the water in a kettle boils at|when the soup pot bubbles, its water is at|tea water boils at]",
     "one hundred degrees Celsius",
     "[水烧开的温度是|水的沸点是|水沸腾的温度是|水壶里的开水是|把水烧开需要|水开始沸腾是在]", "一百摄氏度"),
    ("[the Sun rises in|in the morning the Sun comes up in|the direction of sunrise is"
     "|every day the Sun rises in|to watch the sunrise, look to|the day begins with light from]",
     "the east",
     "[太阳升起的方向是|早晨太阳出来的方向是|日出的方向是|要看日出，就要面向|太阳每天升起的地方是]", "东方"),
    ("[the Sun sets in|in the evening the Sun goes down in|the direction of sunset is"
     "|every day the Sun sets in|to watch the sunset, look to|the last light of the day comes from]",
     "the west",
     "[太阳落下的方向是|傍晚太阳下山的方向是|日落的方向是|要看日落，就要面向|太阳每天落下的地方是]", "西方"),
    ("[the Moon travels around|the Moon goes around|night after night the Moon circles"
     "|the path of the Moon leads around|the Moon never stops circling|the Moon moves around]",
     "the Earth",
     "[月亮绕着转的是|月亮围着转的星球是|月亮绕行的星球是|月亮一直围绕的是|月亮身边的星球是]", "地球"),
    ("[the Earth travels around|the Earth goes around|year after year the Earth circles"
     "|the path of the Earth leads around|the Earth never stops circling|the Earth moves around]",
     "the Sun",
     "[地球绕着转的是|地球围着转的恒星是|地球每年绕行的是|地球一直围绕的是|地球公转围绕的是]", "太阳"),
)
MADE = (
    ("bread", "flour", "面包", "面粉"),
    ("cheese", "milk", "奶酪", "牛奶"),
    ("glass", "sand", "玻璃", "沙子"),
    ("paper", "wood", "纸", "木头"),
    ("tofu", "soybeans", "豆腐", "黄豆"),
    ("chocolate", "cocoa beans", "巧克力", "可可豆"),
    ("wine", "grapes", "葡萄酒", "葡萄"),
)
BOOKS = (
    ("Journey to the West", "Wu Cheng'en", "《西游记》", "吴承恩"),
    ("Dream of the Red Chamber", "Cao Xueqin", "《红楼梦》", "曹雪芹"),
    ("Hamlet", "Shakespeare", "《哈姆雷特》", "莎士比亚"),
    ("Don Quixote", "Cervantes", "《堂吉诃德》", "塞万提斯"),
    ("War and Peace", "Tolstoy", "《战争与和平》", "托尔斯泰"),
    ("Oliver Twist", "Dickens", "《雾都孤儿》", "狄更斯"),
    ("The Old Man and the Sea", "Hemingway", "《老人与海》", "海明威"),
)
INVENTIONS = (
    ("the telephone", "Bell", "电话", "贝尔"),
    ("the airplane", "the Wright brothers", "飞机", "莱特兄弟"),
    ("the phonograph", "Edison", "留声机", "爱迪生"),
    ("dynamite", "Nobel", "炸药", "诺贝尔"),
    ("movable type", "Bi Sheng", "活字印刷术", "毕昇"),
)

# ----------------------------------------------------------------------------------- relations

Row = tuple[str, str, str, str]
Pairs = tuple[tuple[str, str], ...]


class Phrases(NamedTuple):
    """One language's ways to put a relation, since each document keeps to one language."""

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


def column(table: tuple[tuple[str, ...], ...], index: int) -> tuple[Row, ...]:
    """Turn one pair of table columns into rows, so that entities stay on one line each."""
    cut = 2 + 2 * index
    return tuple((r[0], r[cut], r[1], r[cut + 1]) for r in table if r[cut])


def cycle(english: tuple[str, ...], chinese: tuple[str, ...]) -> tuple[Row, ...]:
    """Link each item with the one that comes next, because order is the fact worth knowing."""
    follow = zip(english[1:] + english[:1], chinese[1:] + chinese[:1], strict=True)
    pairs = zip(english, chinese, follow, strict=True)
    return tuple((en, next_en, zh, next_zh) for en, zh, (next_en, next_zh) in pairs)


def order(weight: float, rows: tuple[Row, ...], noun: str, noun_zh: str) -> Relation:
    """Build a what-comes-next relation; days, months and seasons share their wordings."""
    en = Phrases(
        f"Each {noun} and the next one",
        (f"the {noun} after {{s}} is {{o}}", "[right |soon |]after {s} comes {o}",
         "{s} is followed by {o}", "{o} [comes|follows] [right|straight|directly] after {s}",
         f"the {noun} before {{o}} is {{s}}", "when {s} is over, it is {o}", "{s} ends and {o} begins",
         f"the {noun} that [comes after|follows] {{s}} is {{o}}", "{s} comes before {o}",
         f"the next {noun} after {{s}} is {{o}}", f"{{o}} is the {noun} after {{s}}",
         f"if this {noun} is {{s}}, the next {noun} is {{o}}"),
        ((f"which {noun} comes after {{s}}?", "{o}"), ("what comes after {s}?", "{o}"),
         (f"what is the {noun} after {{s}}?", "{o}"), (f"which {noun} follows {{s}}?", "{o}"),
         (f"which {noun} comes before {{o}}?", "{s}")),
    )
    zh = Phrases(
        f"下{noun_zh}是什么",
        ("{s}[之后|过后|后面|的后面]是{o}", "{s}过[去了|完了]，[就是|接着是]{o}", "{o}[在|排在]{s}的后面",
         "{s}[在|排在]{o}的前面", "{o}[之前|前面]是{s}", "紧跟在{s}后面的是{o}", "{s}一结束，{o}就来了",
         "{s}的下一个是{o}", f"{{s}}的下{noun_zh}是{{o}}", "先是{s}，然后是{o}", "{s}过了[就|才]是{o}"),
        (("{s}之后是什么？", "{o}"), (f"{{s}}的下{noun_zh}是什么？", "{o}"),
         ("{s}后面是什么？", "{o}"), ("{o}的前面是什么？", "{s}"), ("过了{s}是什么？", "{o}")),
    )
    return Relation(weight, rows, en, zh)


RELATIONS = {
    "capital": Relation(4.5, column(COUNTRIES, 0), Phrases(
        "Countries and their capitals",
        ("the [capital|capital city] of {s} is {o}", "{o} is the [capital|capital city] of {s}",
         "{s} has a capital [called|named] {o}", "{s}'s capital is {o}", "{s} has {o} as its capital",
         "in {s}, the capital is [|called |the city of ]{o}", "the country whose capital is {o} is {s}",
         "the [name of the capital|city at the head] of {s} is {o}", "{s} is governed from {o}",
         "the city that serves as the capital of {s} is {o}", "the capital of the country {s} is {o}",
         "if you [visit|travel to|fly to] the capital of {s}, you [come to|are in] {o}",
         "[people|those] who live in the capital of {s} live in {o}", "the seat of power in {s} is {o}"),
        (("what is the capital of {s}?", "{o}"), ("which city is the capital of {s}?", "{o}"),
         ("what is the capital city of {s} called?", "{o}"), ("{o} is the capital of which country?",
         "{s}"), ("can you name the capital of {s}?", "{o}"), ("{s} has which capital?", "{o}")),
        ("its capital is {o}", "the capital of the country is {o}", "the capital is [called|named] {o}",
         "{o} is its capital", "the country has {o} as its capital")), Phrases(
        "国家和首都",
        ("{s}的首都[是|就是|叫|叫做|名叫]{o}", "{o}[是|就是]{s}的首都", "{s}这个国家的首都[是|叫]{o}",
         "{s}把首都[设|定]在{o}", "说[到|起]{s}的首都，[大家|人们]就会想到{o}", "在{s}，首都[是|叫]{o}",
         "首都是{o}的国家是{s}", "[去|到]{s}的首都，就是[去|到]{o}", "{s}首都的名字[是|叫]{o}",
         "{s}政府所在的城市是{o}", "作为{s}的首都，{o}很有名", "{s}有一座首都城市，[它叫|名叫]{o}"),
        (("{s}的首都是哪里？", "{o}"), ("{s}的首都叫什么？", "{o}"), ("哪座城市是{s}的首都？", "{o}"),
         ("{o}是哪个国家的首都？", "{s}"), ("你知道{s}的首都吗？", "{o}"), ("{s}把首都设在哪里？", "{o}")),
        ("它的首都是{o}", "这个国家的首都[是|叫]{o}", "首都是{o}", "{o}是它的首都"))),
    "continent": Relation(2, column(COUNTRIES, 1), Phrases(
        "Countries and their continents",
        ("{s} [is|lies] in {o}", "{s} is a country in {o}", "you can find {s} in {o}",
         "{s} belongs to the continent of {o}", "the continent of {s} is {o}",
         "[one of the countries|a country] of {o} is {s}", "to visit {s}, you must travel to {o}",
         "on the map, {s} is part of {o}", "the people of {s} live in {o}"),
        (("which continent is {s} in?", "{o}"), ("where is {s}?", "in {o}"),
         ("on which continent can you find {s}?", "{o}"), ("{s} is a country on which continent?", "{o}")),
        ("it [lies|is] in {o}", "the country is part of {o}", "it is one of the countries of {o}")), Phrases(
        "国家和大洲",
        ("{s}[在|位于|属于]{o}", "{s}是{o}的一个国家", "{s}是一个{o}国家", "{o}有一个国家叫{s}",
         "在地图上，{s}属于{o}", "要去{s}，就要到{o}去", "{s}所在的大洲是{o}", "{s}人生活在{o}"),
        (("{s}在哪个大洲？", "{o}"), ("{s}属于哪个洲？", "{o}"), ("{s}位于哪里？", "{o}"),
         ("在哪个大洲能找到{s}？", "{o}")),
        ("它[在|位于]{o}", "这个国家属于{o}", "它是{o}的国家"))),
    "landmark": Relation(1.6, column(COUNTRIES, 2), Phrases(
        "Famous sights",
        ("[a famous sight in|the pride of] {s} is {o}", "in {s} you can [see|visit] {o}", "{o} is in {s}",
         "[visitors|tourists|travellers] go to {s} to see {o}", "{s} is [famous|known] for {o}",
         "the country that is home to {o} is {s}", "people who visit {s} love to see {o}"),
        (("what can you see in {s}?", "{o}"), ("which famous sight is in {s}?", "{o}"),
         ("in which country is {o}?", "{s}"), ("where can you see {o}?", "in {s}")),
        ("it is [famous|known] for {o}", "visitors like to see {o}", "there you can see {o}")), Phrases(
        "著名的景点",
        ("{s}有名的景点是{o}", "在{s}可以[看到|参观]{o}", "{o}在{s}", "{s}最让人想起的是{o}",
         "[游客|人们]去{s}是为了看{o}", "{s}因为{o}而[有名|出名]", "到{s}旅行的人都想看{o}"),
        (("{s}有什么有名的景点？", "{o}"), ("去{s}可以看到什么？", "{o}"), ("{o}在哪个国家？", "{s}")),
        ("那里有{o}", "它因为{o}而有名", "游客们喜欢去看{o}"))),
    "language": Relation(1, column(COUNTRIES, 3), Phrases(
        "Countries and their languages",
        ("people in {s} speak {o}", "the language of {s} is {o}", "in {s} [people|children] speak {o}",
         "if you travel to {s}, you will hear {o}", "the people of {s} talk to each other in {o}"),
        (("which language do people speak in {s}?", "{o}"), ("what is the language of {s}?", "{o}")),
        ("the people there speak {o}", "its language is {o}")), Phrases(
        "国家和语言",
        ("{s}人说{o}", "在{s}，人们说{o}", "{s}的语言是{o}", "到了{s}，你会听到{o}", "{s}的孩子们讲{o}"),
        (("{s}人说什么语言？", "{o}"), ("在{s}，人们讲什么话？", "{o}")),
        ("那里的人说{o}", "当地的语言是{o}"))),
    "sound": Relation(3, column(ANIMALS, 0), Phrases(
        "Animals and their sounds",
        ("[a|the|every] {s} says {o}", "{p} say {o}", "the sound of {a} is {o}", "{a} goes {o}",
         "the sound that {a} makes is {o}", "when {a} [opens its mouth|calls], you hear {o}",
         "{o} is the [sound|call] of {a}", "if you hear {o}, there is {a} nearby", "{p} go {o}",
         "the animal that says {o} is [a|the] {s}", "{p} call to each other with {o}, {o}"),
        (("what does {a} say?", "{o}"), ("what sound does {a} make?", "{o}"),
         ("which animal says {o}?", "{a}"), ("what sound do {p} make?", "{o}")),
        ("this animal says {o}", "the call of this animal is {o}", "the {s} says {o}")), Phrases(
        "动物的叫声",
        ("{s}的叫声是{o}", "{s}{o}[地|]叫", "{s}叫起来是{o}", "{s}的声音是{o}", "{o}叫的动物是{s}",
         "{s}一[张嘴|叫]，就是{o}", "听到{o}的声音，就知道{s}来了", "{s}会发出{o}的声音", "{a}叫：{o}",
         "{s}说话的声音是{o}", "{s}总是{o}、{o}地叫"),
        (("{s}怎么叫？", "{o}"), ("{s}的叫声是什么？", "{o}"), ("什么动物{o}叫？", "{s}"),
         ("{s}会发出什么声音？", "{o}")),
        ("它的叫声是{o}", "它{o}地叫", "它会发出{o}的声音"))),
    "food": Relation(3, column(ANIMALS, 1), Phrases(
        "What animals eat",
        ("{p} [eat|like to eat|love to eat|feed on] {o}", "{a} [eats|likes to eat|feeds on] {o}",
         "the favourite food of {a} is {o}", "what {a} likes to eat is {o}", "{p} live on {o}",
         "a hungry {s} looks for {o}", "the [meal|food] that {p} like best is {o}",
         "the best food for {a} is {o}", "the animal that loves {o} is the {s}",
         "a good meal for {a} is [a meal of |]{o}", "[nothing makes|few things make] {a} happier than {o}"),
        (("what do {p} eat?", "{o}"), ("what does {a} like to eat?", "{o}"),
         ("what is the favourite food of {a}?", "{o}"), ("which animal likes {o}?", "{a}"),
         ("what is {a} looking for when it is hungry?", "{o}")),
        ("this animal [eats|likes] {o}", "its food is {o}", "the {s} loves {o}")), Phrases(
        "动物的食物",
        ("{s}[吃|爱吃|喜欢吃|最爱吃|最喜欢吃]{o}", "{s}[爱吃|吃]的[食物|东西]是{o}", "{o}是{s}的[食物|美食]",
         "{s}饿了就[找|吃]{o}", "喂{s}要用{o}", "爱吃{o}的动物是{s}", "{s}最喜欢的食物是{o}",
         "{a}正在[吃|找]{o}", "给{s}准备的饭是{o}", "{s}每天都要吃{o}", "{s}看到了{o}就[流口水|很高兴]"),
        (("{s}吃什么？", "{o}"), ("{s}爱吃什么？", "{o}"), ("{s}最喜欢的食物是什么？", "{o}"),
         ("什么动物爱吃{o}？", "{s}"), ("喂{s}要用什么？", "{o}")),
        ("它[爱吃|喜欢吃|吃]{o}", "它最喜欢的食物是{o}", "它饿了就找{o}"))),
    "young": Relation(1.8, column(ANIMALS, 2), Phrases(
        "Animal babies",
        ("a baby {s} is [a|called a] {o}", "[a young|a very young] {s} is called a {o}", "a {o} is a [baby|young] {s}",
         "a {o} grows up to be {a}", "the mother of a {o} is {a}", "the baby of {a} is called a {o}",
         "[a small|a newborn] {s} has the name {o}"),
        (("what is a baby {s} called?", "a {o}"), ("what do you call the baby of {a}?", "a {o}"),
         ("what does a {o} grow up to be?", "{a}")),
        ("its baby is called a {o}", "the baby of this animal is a {o}")), Phrases(
        "动物的宝宝",
        ("{s}的宝宝[叫|叫做|是]{o}", "{o}是{s}的宝宝", "{o}长大以后[变成|就是]{s}", "{s}小时候叫{o}",
         "{o}的妈妈是{s}", "{s}妈妈的孩子叫{o}"),
        (("{s}的宝宝叫什么？", "{o}"), ("{o}长大以后变成什么？", "{s}"), ("{s}小时候叫什么？", "{o}")),
        ("它的宝宝叫{o}", "它小时候叫{o}"))),
    "home": Relation(1.5, column(ANIMALS, 3), Phrases(
        "Where animals live",
        ("{p} live {o}", "{a} lives {o}", "the home of {a} is {o}", "if you look for {a}, look {o}",
         "{a} [sleeps|feels at home|stays] {o}", "the animal that lives {o} is the {s}"),
        (("where does {a} live?", "{o}"), ("where do {p} live?", "{o}"),
         ("where can you find {a}?", "{o}")),
        ("this animal lives {o}", "it feels at home {o}")), Phrases(
        "动物的家",
        ("{s}住在{o}", "{s}的家在{o}", "{s}生活在{o}", "要找{s}，就去{o}", "住在{o}的动物是{s}"),
        (("{s}住在哪里？", "{o}"), ("{s}的家在哪里？", "{o}")), ("它住在{o}", "它的家在{o}"))),
    "task": Relation(2, column(JOBS, 0), Phrases(
        "Jobs and tasks",
        ("{a} {v}", "the [job|work|task] of {a} is to {o}", "{p} {o}", "it is the job of {a} to {o}",
         "every day {a} {v}", "[a person|someone] who {v} is {a}", "what {a} does at work is to {o}",
         "if you become {a}, you will {o}", "the person whose job is to {o} is {a}"),
        (("what does {a} do?", "{v}"), ("what is the job of {a}?", "to {o}"), ("who {v}?", "{a}"),
         ("what do {p} do?", "they {o}")),
        ("the job is to {o}", "such a person {v}")), Phrases(
        "职业和工作",
        ("{s}的工作是{o}", "{s}[每天|天天|常常|]{o}", "{s}负责{o}", "{o}的人是{s}", "当了{s}，就要{o}",
         "一名{s}要会{o}", "{o}是{s}的[工作|任务]", "{s}最拿手的事是{o}"),
        (("{s}做什么工作？", "{o}"), ("谁来{o}？", "{s}"), ("{s}的工作是什么？", "{o}"),
         ("什么人负责{o}？", "{s}")), ("这份工作就是{o}", "做这行要会{o}"))),
    "place": Relation(2, column(JOBS, 1), Phrases(
        "Where people work",
        ("{a} works {o}", "{p} work {o}", "the workplace of {a} is {o}", "every morning {a} goes to work {o}",
         "you can [meet|find] {a} {o}", "the person who works {o} is {a}", "{a} [spends the day|is busy] {o}"),
        (("where does {a} work?", "{o}"), ("where do {p} work?", "{o}"), ("where can you find {a}?", "{o}"),
         ("who works {o}?", "{a}")), ("people with this job work {o}", "this work is done {o}")), Phrases(
        "工作的地方",
        ("{s}在{o}工作", "{s}[上班|工作]的地方是{o}", "{s}每天去{o}上班", "在{o}工作的人是{s}",
         "要找{s}，就去{o}", "在{o}能见到{s}", "{s}整天待在{o}"),
        (("{s}在哪里工作？", "{o}"), ("谁在{o}工作？", "{s}"), ("{s}上班的地方是哪里？", "{o}")),
        ("工作的地方是{o}", "上班要去{o}"))),
    "colour": Relation(3, COLOURS, Phrases(
        "Things and their colours",
        ("{s} is {o}", "the colour of {s} is {o}", "[to paint|to draw] {s}, use [the colour |a pencil that is |]{o}",
         "{o} is the colour of {s}", "when you look at {s}, you see the colour {o}", "{s} has the colour {o}",
         "{s} looks {o}", "if you draw {s}, [colour|paint] it {o}", "in the picture {s} is {o}",
         "something [with the same colour as|as {o} as] {s} is {o}"),
        (("what colour is {s}?", "{o}"), ("what is the colour of {s}?", "{o}"),
         ("which colour does {s} have?", "{o}"), ("which pencil do you need to draw {s}?", "the {o} one"))),
        Phrases("各种颜色",
        ("{s}是{o}的", "{s}的颜色是{o}", "{o}是{s}的颜色", "画{s}要用{o}", "{s}看上去是{o}的", "{s}穿着{o}的衣裳",
         "给{s}涂颜色，要涂{o}", "图画里的{s}是{o}的", "说到{s}的颜色，[大家|人们]会说{o}", "{s}有着{o}的外表"),
        (("{s}是什么颜色的？", "{o}"), ("{s}的颜色是什么？", "{o}"), ("画{s}要用什么颜色？", "{o}")))),
    "opposite": Relation(2, OPPOSITE_PAIRS + tuple((b, a, d, c) for a, b, c, d in OPPOSITE_PAIRS), Phrases(
        "Opposites",
        ("the opposite of {s} is {o}", "{s} [and|or] {o} [are|make a pair of] opposites", "{s} is the opposite of {o}",
         "the opposite of the word {s} is [|the word ]{o}", "if something is not {s}, it may be {o}",
         "the word {s} has the opposite {o}", "say {s} and then the opposite, {o}",
         "the other end of {s} is {o}", "a thing can be {s}, or it can be the opposite, which is {o}"),
        (("what is the opposite of {s}?", "{o}"), ("which word is the opposite of {s}?", "{o}"),
         ("what is the opposite of the word {s}?", "{o}"))), Phrases(
        "反义词",
        ("“{s}”的反义词是“{o}”", "“{s}”和“{o}”[是一对反义词|意思相反]", "与“{s}”[相反|相对]的[词|字]是“{o}”",
         "“{s}”反过来就是“{o}”", "“{s}”的反面是“{o}”", "不是“{s}”，那就是“{o}”", "“{s}”对“{o}”",
         "和“{s}”意思相反的是“{o}”"),
        (("“{s}”的反义词是什么？", "{o}"), ("和“{s}”意思相反的词是什么？", "{o}"), ("“{s}”反过来是什么？", "{o}")))),
    "day": order(3, cycle(DAYS, DAYS_ZH), "day", "一天"),
    "month": order(1.3, cycle(MONTHS, MONTHS_ZH), "month", "一个月"),
    "season": order(3, cycle(SEASONS, SEASONS_ZH), "season", "一个季节"),
    "body": Relation(2.5, BODY, Phrases(
        "The body at work",
        ("you use your {s} to {o}", "I use my {s} to {o}", "you {o} with your {s}", "I {o} with my {s}",
         "with your {s} you can {o}", "the job of the {s} is to {o}", "[without|if you had no] {s} you could not {o}",
         "you need your {s} to {o}", "to {o}, you use your {s}", "thanks to your {s} you can {o}",
         "what you {o} with is your {s}", "it is with your {s} that you {o}"),
        (("what do you {o} with?", "with my {s}"), ("what can you do with your {s}?", "{o}"),
         ("what do you use your {s} for?", "to {o}"))), Phrases(
        "身体的本领",
        ("我们用{s}{o}", "{s}[可以|能|是用来]{o}[的|]", "{s}的[本领|作用|工作]是{o}", "用来{o}的是{s}", "没有{s}，就不能{o}",
         "人们靠{s}来{o}", "想要{o}，就要用{s}", "{s}帮助我们{o}", "有了{s}，我们才能{o}"),
        (("我们用什么{o}？", "{s}"), ("{s}有什么作用？", "{o}"), ("{s}可以做什么？", "{o}")))),
    "record": Relation(3.5, RECORDS, Phrases(
        "Records and names",
        ("{s} is {o}", "{o} is {s}", "the name of {s} is {o}", "when people speak of {s}, they mean {o}",
         "if you ask for {s}, the answer is {o}", "a book about {s} is a book about {o}",
         "{s} [has the name|goes by the name of|is called] {o}", "in the quiz, {s} was {o}"),
        (("what is {s}?", "{o}"), ("what is the name of {s}?", "{o}"), ("can you name {s}?", "{o}"))), Phrases(
        "世界之最和名字",
        ("{s}[是|就是|叫]{o}", "{o}[是|就是]{s}", "{s}的名字是{o}", "说[到|起]{s}，[人们|大家]就会想到{o}",
         "如果有人问{s}是什么，答案是{o}", "{s}叫做{o}", "{s}不是别的，正是{o}"),
        (("{s}是什么？", "{o}"), ("{s}叫什么名字？", "{o}"), ("你知道{s}吗？", "{o}")))),
    "symbol": Relation(3, SYMBOLS, Phrases(
        "Chemical symbols",
        ("the [chemical symbol|symbol|short sign] [for|of] {s} is {o}", "{o} [is the symbol for|stands for|means] {s}",
         "[scientists|chemists] write {s} as {o}", "in chemistry, {s} is written {o}", "{s} has the symbol {o}",
         "the letters for {s} are the sign {o}", "the element with the symbol {o} is {s}"),
        (("what is the chemical symbol for {s}?", "{o}"), ("what is the symbol of {s}?", "{o}"),
         ("how do chemists write {s}?", "{o}"), ("which element has the symbol {o}?", "{s}"))), Phrases(
        "元素符号",
        ("{s}的[元素符号|化学符号|符号]是{o}", "{o}是{s}的元素符号", "{s}的符号写[作|成|做]{o}", "{s}元素用{o}表示",
         "在化学里，{s}写[作|成]{o}", "科学家用{o}来表示{s}", "符号{o}代表{s}", "{s}这种元素的符号是{o}"),
        (("{s}的元素符号是什么？", "{o}"), ("{s}的符号怎么写？", "{o}"), ("{o}代表什么元素？", "{s}")))),
    "count": Relation(2.5, COUNTS, Phrases(
        "How many",
        ("{s} has {o}", "{s} has [exactly|just] {o}", "the number of {u} that {s} has is {k}",
         "if you count the {u} of {s}, you get {k}", "count the {u} of {s}: there are {k}",
         "you will find that {s} has {o}", "{s} always has {o}"),
        (("how many {u} does {s} have?", "{k}"), ("what is the number of {u} that {s} has?", "{k}"))), Phrases(
        "有多少",
        ("{s}有{o}", "{s}[一共|总共|正好]有{o}", "数一数，{s}有{o}", "{s}不多不少，有{o}", "{s}总是有{o}", "大家数过，{s}有{o}"),
        (("{s}有多少{u}？", "{o}"), ("{s}一共有多少{u}？", "{o}"), ("请问{s}有几{u}？", "{o}")))),
    "nature": Relation(4, NATURE, Phrases(
        "Nature", ("{s} {o}",),
        (("finish the sentence: {s} what?", "{o}"), ("what is the missing end: {s} ...?", "{o}"))), Phrases(
        "自然常识", ("{s}{o}",), (("{s}什么？", "{o}"), ("请把话说完：{s}什么？", "{o}")))),
    "made": Relation(3, MADE, Phrases(
        "What things are made from",
        ("{s} is made from {o}", "people make {s} from {o}", "to make {s}, you need {o}", "{o} can be turned into {s}",
         "[a worker|the factory] turns {o} into {s}", "we get {s} from {o}", "the main ingredient of {s} is {o}",
         "{s} comes from {o}", "what {s} is made from is {o}", "without {o} there would be no {s}"),
        (("what is {s} made from?", "{o}"), ("what do you need to make {s}?", "{o}"),
         ("what can be made from {o}?", "{s}"))), Phrases(
        "东西是用什么做的",
        ("{s}是用{o}做的", "做{s}要用{o}", "{o}可以做成{s}", "人们用{o}做{s}", "{s}的原料是{o}", "{s}来自{o}",
         "没有{o}，就没有{s}", "工人把{o}变成{s}", "做{s}的主要材料是{o}"),
        (("{s}是用什么做的？", "{o}"), ("做{s}要用什么？", "{o}"), ("{o}可以做成什么？", "{s}")))),
    "book": Relation(3.5, BOOKS, Phrases(
        "Books and their authors",
        ("{s} was written by {o}", "the author of {s} is {o}", "{o} wrote {s}", "{o} is the author of {s}",
         "the [writer|person] who wrote {s} is {o}", "{s} is a [book|work|classic] by {o}", "{s} is the work of {o}",
         "[readers|we all] thank {o} for {s}", "the name on the cover of {s} is {o}"),
        (("who wrote {s}?", "{o}"), ("who is the author of {s}?", "{o}"), ("what did {o} write?", "{s}"),
         ("by whom was {s} written?", "{o}"))), Phrases(
        "书和作者",
        ("{s}的作者是{o}", "{s}是{o}写的", "{o}写了{s}", "{o}是{s}的作者", "写{s}的人是{o}", "{s}[出自|来自]{o}之手",
         "{s}是{o}的[作品|名著]", "{s}的封面上写着{o}", "写出{s}的作家叫{o}"),
        (("{s}的作者是谁？", "{o}"), ("{s}是谁写的？", "{o}"), ("{o}写了什么书？", "{s}"), ("谁写了{s}？", "{o}")))),
    "invention": Relation(3.5, INVENTIONS, Phrases(
        "Inventions",
        ("{s} was invented by {o}", "{o} invented {s}", "the invention of {s} was the work of {o}",
         "we owe {s} to {o}", "the world got {s} from {o}", "credit for inventing {s} goes to {o}",
         "the story of {s} begins with {o}", "[people|we all] thank {o} for {s}"),
        (("who invented {s}?", "{o}"), ("by whom was {s} invented?", "{o}"), ("what did {o} invent?", "{s}"))), Phrases(
        "发明",
        ("{s}是{o}发明的", "{o}发明了{s}", "{s}的发明[人|者]是{o}", "发明{s}的人是{o}", "{s}的发明要归功于{o}",
         "说到{s}的发明，就要提到{o}", "因为有了{o}，才有了{s}", "最早发明{s}的是{o}"),
        (("谁发明了{s}？", "{o}"), ("{s}是谁发明的？", "{o}"), ("{o}发明了什么？", "{s}")))),
}

# -------------------------------------------------------------------------------------- scenes

NAMES = (
    ("Tom", "he"), ("Anna", "she"), ("Ben", "he"), ("Lily", "she"), ("Max", "he"), ("Mia", "she"),
    ("Jack", "he"), ("Rosa", "she"), ("Oscar", "he"), ("Emma", "she"), ("Leo", "he"),
    ("Nina", "she"), ("Sam", "he"), ("Clara", "she"), ("Hugo", "he"), ("Ella", "she"),
)
NAMES_ZH = (
    ("小明", "他"), ("小红", "她"), ("小刚", "他"), ("小丽", "她"), ("冬冬", "他"), ("婷婷", "她"),
    ("乐乐", "他"), ("小雨", "她"), ("阿宝", "他"), ("佳佳", "她"), ("大伟", "他"), ("小云", "她"),
    ("天天", "他"), ("晓梅", "她"),
)
PRONOUNS = {"he": ("him", "his"), "she": ("her", "her"), "他": ("他", "他的"), "她": ("她", "她的")}

# Each scene names the relations that its subject must have; the first one supplies the fact.
Scene = tuple[tuple[str, ...], str]
SCENES: tuple[Scene, ...] = (
    (("capital", "landmark"),
     "[Last spring|One summer|Last autumn|In the school holidays] {n} [went|travelled|flew] to {s} "
     "with {his} [mother|father|aunt|uncle|grandmother]. [They stayed in {o}, the capital of {s}."
     "|They landed in {o}, because {o} is the capital of {s}.|The first stop was {o}, the capital.] "
     "[On the second day {n} lost {his} [hat|map|camera|umbrella], but a kind [girl|old man|waiter] "
     "found it.|In a busy street {n} lost the way, but a friendly [woman|boy|policeman] led {him} "
     "back to the hotel.|It rained all morning, so they [played cards|told jokes|wrote postcards] "
     "until the Sun came out.] Then they went to see {landmark}, and {n} [took ten photos|laughed "
     "with joy|drew a picture of it]. [Now {n} will never forget that {fact}.|At home {he} told "
     "{n2}: \"{Fact}.\"|\"{Fact},\" {n} wrote in {his} notebook that night.]"),
    (("capital", "continent"),
     "Dear {n2},\n[I am|We are] in {s} this week. {Fact}. [The streets are full of people|The food "
     "is very good|The weather is warm and bright], and [I have made a new friend|I have learnt ten "
     "new words|I sleep well]. [It is a long way from home, for {s} lies in {continent}.|I like "
     "{continent} very much.|Look for {s} on your map of {continent}!] [See you soon|With love|Best "
     "wishes],\n{n}"),
    (("food",),
     "[One morning|One day|After school] {n} met {a} that was very hungry. {n} offered it [a biscuit"
     "|some soup|a slice of cake|some cheese], but the {s} only [looked away|sniffed at it|shook its "
     "head]. [\"What is wrong?\" asked {n}.|{n} did not know what to do.|{n} felt sorry for it.] Then "
     "{n2} came along and [said|explained], \"{Fact}.\" So they [looked for|went to get|found] some "
     "{o}. [The {s} was happy at last|The {s} ate and ate|Soon the {s} was full and fell asleep], "
     "and [the three became friends|{n} had learnt something new|{n} came back every day]."),
    (("young", "sound"),
     "[One evening|On a foggy morning|After the storm] a little {young} could not find its mother. It "
     "looked [behind the barn|under the old bridge|along the river] and [behind the big tree|near "
     "the gate|in the tall grass], but [nobody was there|it found only leaves]. [The {young} began to "
     "cry.|The {young} was tired and afraid.] Then, from [far away|the other side of the hill], "
     "came a loud \"{sound}\"! It was the mother, {a}. [She ran to her baby|She had looked for it "
     "everywhere], and {n} [smiled|clapped]. \"{Fact},\" {he} told {n2}."),
    (("sound",),
     "In the [middle of the night|early morning] {n} woke up. [Outside|Near the window] something "
     "went \"{o}, {o}\". [Was it a ghost?|Who could that be?] {n} took a [lamp|torch] and opened the "
     "door [very slowly|with shaking hands]. It was only {a}! \"Of course,\" said {n}, \"{fact}.\" "
     "[Then {he} went back to bed and slept until noon.|{n2} laughed about it for a week.]"),
    (("task", "place"),
     "{n}'s [uncle|aunt|neighbour|cousin] is {a} and works {place}. [One day|On a rainy Tuesday|Last "
     "week] {n} was allowed to come along. [At first everything was new and strange.|There was a lot "
     "to see.] {n} asked, \"What is the most important thing for {a}?\" The answer was: \"{Fact}.\" "
     "[{n} helped until the evening|{n} watched for hours|{n} asked a hundred questions]. "
     "[\"When I grow up, I want to be {a} too,\" {he} said.|On the way home {he} told {n2} all "
     "about it.]"),
    (("colour",),
     "{n} wanted to paint {s} for {his} [grandmother|teacher|little brother]. But the {o} paint [had "
     "dried up|was gone|was nowhere to be found]. \"{Fact},\" said {n}, \"so I [really need that "
     "paint|cannot use another colour].\" {n2} [ran home|opened a box] and came back with a [small "
     "pot|full tube] of {o} paint. [Together they finished the picture|Soon the picture was ready], "
     "and [it hangs on the wall today|everyone liked it|{n} gave {n2} a hug]."),
    (("record",),
     "[One night|After supper|At bedtime] {n} asked [Grandpa|Grandma|Dad] a question. \"What is {s}?\" "
     "[Grandpa put down his book.|The room became quiet.|It was a good question.] \"It is {o},\" came "
     "the answer. [\"{Fact}. Remember it well.\"|\"I wonder how people found out,\" said {n}.|{n} "
     "thought about {o} until {he} fell asleep.] [The next day {n} told {n2}: \"{Fact}.\"|In the "
     "morning {he} drew a picture of it for {n2}.]"),
    (("book",),
     "It was raining, so {n} went to the library. On a [high|dusty|low] shelf {he} found {s}. [The "
     "book was old and heavy.|There was a fine picture on the cover.] \"Who wrote this?\" {he} asked. "
     "[The librarian|{n2}] [smiled|thought for a moment] and said, \"{Fact}.\" {n} [read until "
     "closing time|took the book home|sat down by the window], and [the rain was soon forgotten|the "
     "hours flew by]."),
    (("day",),
     "[A week in {n}'s diary.|From the diary of {n}.|My diary, by {n}.] {s}: today I [planted a bean"
     "|lost a tooth|found a coin|baked a cake with {n2}|saw a rainbow]. {Fact}, so I [went to bed "
     "early|could hardly wait]. {o}: [the garden was wet and I stayed in|{n2} came and we played all "
     "day|I told everybody at school about it]. [It was a good day.|I was very happy.|What a day!]"),
    (("opposite",),
     "{n} and {n2} play a game. {n} says a word, and {n2} must find the opposite. [{n} thinks for a "
     "while and|First {n} smiles and] says, \"{s}\". \"[Easy|I know], it is {o}!\" [calls|answers] "
     "{n2}. \"Right, {fact},\" says {n}. [Then they change places.|They play until dinner is ready.]"),
    (("made",),
     "\"Where does {s} come from?\" {n} asked [at breakfast|one day|on the bus]. {n2} [laughed|did not "
     "know]. So they went to [a shop|the market|a small factory] and asked [the owner|a friendly "
     "woman|an old man]. \"{Fact},\" was the answer, \"and it takes [a lot of work|time and care].\" "
     "[Since then {n} looks at {o} with new eyes.|{n} bought some {o} and wanted to try it at once.]"),
    (("food", "home"),
     "[Who am I?|A riddle.|Guess who I am.] [I live {home}|My home is {home}], and [I like to eat {food}"
     "|my favourite food is {food}]. [Do you know me?|What am I?] [I am {a}!|The answer: {a}.]"),
    (("capital", "landmark"),
     "[Which country am I?|A riddle about a country.] [My capital is {capital}|{capital} is my capital"
     "], and [you can see {landmark} here|I am known for {landmark}]. [The answer is|I am] {s}."),
    (("invention",),
     "[A long time ago|Many years ago] nobody had heard of {s}. [People laughed at the idea.|Many tried "
     "and failed.] But there was a great idea, and {fact}. [Life was never the same again|People "
     "were amazed], [thought {n}|said {n} to {n2}], [closing the book|looking out of the window]."),
    (("capital", "landmark"),
     "[去年春天|暑假里|有一年秋天|放假的时候]，{n}[跟着|和][妈妈|爸爸|姑姑|舅舅|奶奶]去{s}旅行。[他们住在首都{o}。"
     "|飞机降落在{o}，因为{o}是{s}的首都。|第一站是首都{o}。][第二天，{n}的[帽子|地图|相机|雨伞]丢了，一位好心的[老"
     "爷爷|姐姐|司机]帮{he}找了回来。|在热闹的街上，{n}迷了路，一位[阿姨|警察|小哥哥]把{he}送回了旅馆。|上午下起了"
     "大雨，他们就[打牌|讲笑话|写明信片]，一直等到天晴。]后来他们去看了{landmark}，{n}[拍了很多照片|高兴得跳了起来"
     "|还画了一幅画]。[从此{n}再也不会忘记：{fact}。|回家以后，{he}告诉{n2}：“{fact}。”|晚上，{n}在本子上写道：{fact}。]"),
    (("capital", "continent"),
     "亲爱的{n2}：\n[我|我们]这个星期在{s}。{fact}。这里[街上人很多|饭菜很好吃|天气很暖和]，[我交了一个新朋友|我学会了"
     "几句当地话|我每天都睡得很香]。[{s}在{continent}，离家很远。|我很喜欢{continent}。|你在{continent}的地图上找一找"
     "{s}吧！][祝你快乐！|盼望见到你！|祝你天天开心！]\n{n}"),
    (("food",),
     "[一天早上|有一天|放学以后]，{n}遇到了{a}，它饿极了。{n}[给它饼干|给它一碗汤|递给它一块蛋糕]，可是{s}[摇摇头|闻了闻"
     "就走开了|看也不看]。[“怎么回事呢？”{n}问。|{n}不知道怎么办才好。|{n}很着急。]这时{n2}[走过来|跑过来]说：“{fact}。”"
     "他们赶紧找来了{o}。{s}[吃得可香了|大口大口地吃了起来|吃饱就睡着了]，[他们三个成了好朋友|{n}学到了新知识"
     "|{n}以后天天来看它]。"),
    (("sound",),
     "[半夜里|天还没亮]，{n}忽然醒了。[窗外|门外|院子里]传来“{o}、{o}”的声音。[是谁呢？|难道有小偷？]{n}[拿起手电筒"
     "|提着灯]，[轻轻地|小心地]打开门一看，原来是{a}！“对了，{fact}。”{n}说。[{he}放心地回去睡觉了。|后来{n2}为这件事笑了"
     "好几天。|第二天，{he}把这件事讲给{n2}听。]"),
    (("young", "sound"),
     "[傍晚|大雾的早晨|暴风雨过后]，小小的{young}找不到妈妈了。它[跑到河边|绕过大树|穿过草地]，[哪里都没有|只看见几片"
     "落叶]。[它急得快哭了。|它又累又怕。]这时，[远处|山坡那边]传来了“{sound}”的声音。是{s}妈妈！[它们高兴地靠在一起"
     "|妈妈也找了它很久]。{n}对{n2}说：“{fact}。”"),
    (("task", "place"),
     "{n}的[叔叔|阿姨|表哥|邻居]是一名{s}，上班的地方是{place}。[有一天|上个星期]，{n}跟着去看了看。[那里的一切都很新鲜。"
     "|要看的东西可真多。]{n}问：“当{s}最重要的是什么？”回答是：“{fact}。”{n}[帮了一下午的忙|看了很久很久|问了许多问题]。"
     "[“长大以后，我也想当{s}。”{he}说。|回家的路上，{he}把这些都讲给了{n2}听。]"),
    (("colour",),
     "{n}想画一幅画送给[奶奶|老师|弟弟]，画的是{s}。可是{o}的颜料[用完了|干了|找不到了]。“{fact}，”{n}说，“[我一定要这种"
     "颜色|不能用别的颜色]。”{n2}[跑回家|打开书包]，拿来了一[瓶|管|盒]{o}的颜料。[他们一起把画画完了|画很快就完成了]，"
     "[大家都说好看|现在它挂在墙上|{n}高兴极了]。"),
    (("record",),
     "[一天晚上|吃过晚饭|睡觉以前]，{n}问[爷爷|奶奶|爸爸]：“{s}是什么？”[屋子里安静下来。|这是个好问题。|大家都想了想。]“是"
     "{o}。”[{n}点点头。|“{fact}，要记住哦。”]{n}[躺在床上还在想着{o}|梦里也见到了{o}]。[第二天，{he}告诉{n2}：“{fact}。”"
     "|早上起来，{he}给{n2}画了一幅画。]"),
    (("book",),
     "外面下着雨，{n}来到图书馆，在[高高的|旧|靠窗的]书架上找到了{s}。[这本书又厚又旧。|封面上有一幅漂亮的画。]“这是谁写的"
     "？”{he}问。[管理员|{n2}][笑着|想了想]说：“{fact}。”{n}[一直读到关门|把书借回了家|坐在窗边读了起来]，[连下雨都忘了"
     "|时间过得飞快]。"),
    (("day",),
     "[{n}的日记|{n}写的日记|翻开{n}的日记]：{s}，今天我[种了一颗豆子|捡到一枚硬币|和{n2}一起做了蛋糕|看到了彩虹|掉了一颗"
     "牙]。{fact}，我[早早就睡了|等不及了]。{o}，[{n2}来找我玩了一整天|下雨了，我待在家里|我把这件事告诉了同学们]。"
     "[真是开心的一天！|我高兴极了。|这一天过得真好。]"),
    (("opposite",),
     "{n}和{n2}玩游戏，一个人说词，另一个人说反义词。{n}[想了想|笑了笑]，说：“{s}。”{n2}[马上回答|大声说]：“{o}！”“对，"
     "{fact}。”{n}说。[然后他们交换了角色。|他们一直玩到吃晚饭。]"),
    (("made",),
     "“{s}是从哪里来的？”[吃早饭时|有一天|在车上]{n}问。{n2}[笑了笑|也不知道]。他们就去问[店主|工厂的师傅|一位老爷爷]。"
     "“{fact}，”他说，“[还要花不少工夫呢|要很细心才行]。”[从那以后，{n}一看到{o}就会想起{s}。|{n}买了一些{o}，想马上试一试。]"),
    (("food", "home"),
     "[猜猜我是谁。|猜一个谜语。|谜语时间到了。][我住在{home}|我的家在{home}]，[我爱吃{food}|我最喜欢吃的是{food}]。"
     "[你认识我吗？|我是谁呢？][我就是{s}！|谜底是{s}。]"),
    (("capital", "landmark"),
     "[猜猜我是哪个国家。|猜国家的谜语。][我的首都是{capital}|{capital}是我的首都]，[来这里可以看到{landmark}"
     "|我因为{landmark}而有名]。[答案是|我是]{s}。"),
    (("invention",),
     "[很久以前|许多年前]，人们[没听说过{s}|还不知道{s}是什么]。[有人试过，可是失败了。|说出来也没有人相信。]后来，{fact}。"
     "[人们的生活从此变了样|大家都惊讶极了]，{n}[读到这里|讲到这里]，[合上了书|望着窗外]，对{n2}说：“真了不起！”"),
)

# ---------------------------------------------------------------------------------- generators

OPENERS = {
    "en": ("[{n}|{n2}|Every pupil|My sister|Our teacher|Grandpa|Mum] [knows|says|remembers|has learnt] that ",
           "[we know|we learn at school|it is well known|my teacher says|do not forget|I read in a book|"
           "it is a fact|the book says|everyone can see|it is true|please remember] that ",
           "[of course, |in fact, |as you know, |as we all know, |yes, |listen: |today's lesson: ]"),
    "zh": ("[{n}|{n2}|老师|爷爷|妈妈|姐姐|大家|同学们][知道|说|告诉我|记得]，",
           "[我们都知道|我们学过|书上写着|书上说|请记住|不要忘记|谁都知道|其实|当然|你听|今天我们学到]，"),
}
CLOSERS = {
    "en": ("[{n}|{n2}] [wrote this down|likes this lesson|will remember it|told a friend about it].",
           "[This is easy to remember|Now you know it, too|That is what we learnt today], {n}."),
    "zh": ("{n}把[它|这些|这句话][记在了本子上|记住了|讲给{n2}听]。", "{n}[觉得这很有趣|听得很认真|今天又学到了新知识]。"),
}
PAIRINGS = {"en": ("{x}, and {y}", "{x}, but {y}", "{x}, while {y}", "{x}; {y}"),
            "zh": ("{x}，{y}", "{x}，而{y}", "{x}；{y}", "{x}，还有，{y}")}
QUESTION_STYLES = {
    "en": ("Q: {q}\nA: {a}", "Question: {q}\nAnswer: {a}", "{n}: {q}\n{n2}: {a}", "{q} {a}", "{q}\n{a}",
           "{n} asked, \"{q}\" {n2} answered, \"{a}\"", "{i}. {q} {a}"),
    "zh": ("问：{q}\n答：{a}", "问题：{q}\n回答：{a}", "{n}：{q}\n{n2}：{a}", "{q}{a}", "{q}\n{a}",
           "{n}问：“{q}”{n2}说：“{a}”", "{i}．{q}{a}"),
}
MEASURES = {"马": "匹", "牛": "头", "猪": "头", "北极熊": "头", "骆驼": "头", "蚕": "条", "狗": "条"}
IRREGULAR = {"sheep": "sheep", "fisherman": "fishermen"}
THINGS = (("apple", "apples", "个苹果"), ("book", "books", "本书"), ("pencil", "pencils", "支铅笔"),
          ("flower", "flowers", "朵花"), ("sweet", "sweets", "颗糖"), ("card", "cards", "张卡片"),
          ("balloon", "balloons", "个气球"), ("shell", "shells", "个贝壳"))
NUMBERS = ("zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen "
           "fifteen sixteen seventeen eighteen nineteen twenty").split()
DIGITS_ZH = "零一二三四五六七八九十"

Fields = dict[str, str]
Fact = tuple[str, Row]
Generator = Callable[[random.Random, str], str]


def expand(rng: random.Random, text: str) -> str:
    """Resolve the choices from the inside out, so that choices may be nested."""
    while (changed := re.sub(r"\[([^\[\]]*)\]", lambda m: rng.choice(m[1].split("|")), text)) != text:
        text = changed
    return text


def capital(text: str) -> str:
    """Upper-case the first letter only, because names inside the sentence must stay as they are."""
    return text[:1].upper() + text[1:]


def plural(noun: str) -> str:
    """Inflect the few nouns that templates use in the plural."""
    return IRREGULAR.get(noun, noun + "s")


def third_person(phrase: str) -> str:
    """Turn "catch fish" into "catches fish", so that tables need only the base form."""
    verb, _, rest = phrase.partition(" ")
    if verb.endswith(("ch", "sh", "x", "o")):
        verb += "es"
    elif verb.endswith("y") and verb[-2:-1] not in "aeiou":
        verb = verb[:-1] + "ies"
    else:
        verb += "s"
    return f"{verb} {rest}".strip()


def sides(lang: str, row: Row) -> tuple[str, str]:
    """Pick the subject and the answer in one language."""
    return (row[0], row[1]) if lang == "en" else (row[2], row[3])


def facts_in(lang: str) -> list[Fact]:
    """List the facts that the language can state; a few animal babies have no short Chinese name."""
    every = [(name, row) for name, relation in RELATIONS.items() for row in relation.rows]
    return [(name, row) for name, row in every if all(sides(lang, row))]


def by_subject(facts: list[Fact]) -> dict[str, dict[str, Row]]:
    """Group facts by their subject, so that a document can stay with one animal or country."""
    subjects: dict[str, dict[str, Row]] = {}
    for name, row in facts:
        subjects.setdefault(row[0], {})[name] = row
    return subjects


FACTS = {lang: facts_in(lang) for lang in ("en", "zh")}
SUBJECTS = {lang: by_subject(facts) for lang, facts in FACTS.items()}
WEIGHTS = {lang: [RELATIONS[name].weight for name, _ in facts] for lang, facts in FACTS.items()}


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
    s, o = sides(lang, row)
    number, _, unit = o.partition(" ")
    if lang == "zh":
        o = o.replace(" ", "")
        return {"s": s, "o": o, "a": f"一{MEASURES.get(s, '只')}{s}", "k": number, "u": unit}
    article = "an" if s[0] in "aeiou" else "a"
    return {"s": s, "o": o, "a": f"{article} {s}", "p": plural(s), "v": third_person(o),
            "k": number, "u": unit}


def pick_fact(rng: random.Random, lang: str) -> Fact:
    """Draw a fact by weight, so that the core facts come up more often than the rest."""
    return rng.choices(FACTS[lang], WEIGHTS[lang])[0]


def same_relation(rng: random.Random, lang: str, fact: Fact, count: int) -> list[Fact]:
    """Return the fact with up to ``count - 1`` others of its kind, in random order."""
    others = [f for f in FACTS[lang] if f[0] == fact[0] and f != fact]
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
    if rng.random() < 0.45:
        text = expand(rng, rng.choice(OPENERS[lang]).format(**people(rng, lang))) + text
    return finish(lang, text)


def join(lang: str, sentences: list[str]) -> str:
    """Join sentences as the language does: Chinese puts no space between them."""
    return (" " if lang == "en" else "").join(sentences)


def paragraph(rng: random.Random, lang: str) -> str:
    """Tell several facts about one subject, or of one kind where the subject has a single fact."""
    first = pick_fact(rng, lang)
    related = [f for f in SUBJECTS[lang][first[1][0]].items() if f != first]
    lines = [sentence(rng, lang, first)]
    if related:
        for fact in rng.sample(related, rng.randint(1, min(3, len(related)))):
            lines.append(finish(lang, clause(rng, lang, fact, follow=rng.random() < 0.6)))
    else:
        others = same_relation(rng, lang, first, rng.randint(2, 4))
        lines += [sentence(rng, lang, fact) for fact in others if fact != first]
    if rng.random() < 0.5:
        lines.append(sentence(rng, lang, first))
    if rng.random() < 0.15:
        lines.append(expand(rng, rng.choice(CLOSERS[lang]).format(**people(rng, lang))))
    return join(lang, lines)


def comparison(rng: random.Random, lang: str) -> str:
    """Set facts of one kind side by side, so that the model has to keep the subjects apart."""
    group = same_relation(rng, lang, pick_fact(rng, lang), 4)
    lines = []
    for x, y in zip(group[::2], group[1::2], strict=False):
        pair = rng.choice(PAIRINGS[lang])
        lines.append(finish(lang, pair.format(x=clause(rng, lang, x), y=clause(rng, lang, y))))
    return join(lang, lines)


def listing(rng: random.Random, lang: str) -> str:
    """Write a titled list, the barest form of a fact."""
    fact = pick_fact(rng, lang)
    mark = rng.choice((": ", " - ") if lang == "en" else ("：", "——"))
    rows = [fields(lang, f[1]) for f in same_relation(rng, lang, fact, rng.randint(4, 7))]
    lines = [expand(rng, f"- {row['s']}{mark}{row['o']}") for row in rows]
    return "\n".join([phrases(lang, fact[0]).title + mark.rstrip(" -—：:") + ":", *lines])


def questions(rng: random.Random, lang: str) -> str:
    """Write questions with short or full answers in one of several layouts."""
    style = rng.choice(QUESTION_STYLES[lang])
    who = people(rng, lang)
    first = pick_fact(rng, lang)
    count = rng.randint(2, 5)
    group = same_relation(rng, lang, first, count) if rng.random() < 0.5 else [
        first, *(pick_fact(rng, lang) for _ in range(count - 1))]
    blocks = []
    for i, fact in enumerate(group, 1):
        question, short = rng.choice(phrases(lang, fact[0]).questions)
        form = fields(lang, fact[1])
        full = rng.random() < 0.5
        answer = clause(rng, lang, fact) if full else expand(rng, short.format(**form))
        asked = capital(expand(rng, question.format(**form)))
        blocks.append(style.format(q=asked, a=finish(lang, answer), i=i, **who))
    return "\n".join(blocks)


def scene(rng: random.Random, lang: str) -> str:
    """Tell a small story, letter, riddle or diary entry that a fact is part of."""
    english = lang == "en"
    needs, text = rng.choice([s for s in SCENES if s[1].isascii() == english])
    able = [rows for rows in SUBJECTS[lang].values() if all(need in rows for need in needs)]
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
        start = {"+": f"{n}有{a}{thing}，{n2}又给了{him}{b}{thing[0]}。",
                 "-": f"{n}有{a}{thing}，送给{n2}{b}{thing[0]}。",
                 "×": f"{n}有{a}个盒子，每个盒子里有{b}{thing}。"}[op]
        return f"{start}现在{he}有几{thing}？{a} {op} {b} = {c}，所以{n}有{c}{thing}。"

    def amount(k: int) -> str:
        return f"{k} {one if k == 1 else many}"

    start = {"+": f"{n} has {amount(a)}. {n2} gives {him} {b} more.",
             "-": f"{n} has {amount(a)} and gives {b} to {n2}.",
             "×": f"{n} has {a} {'box' if a == 1 else 'boxes'} with {amount(b)} in each box."}[op]
    return (f"{start} How many {many} does {he} have now? {a} {op} {b} = {c}, "
            f"so {n} has {amount(c)}.")


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
            small = rng.randint(1, big)
            a, b, c = (big, small, big - small) if op == "-" else (small, big - small, big)
        if style == 0:
            lines.append(word_problem(rng, lang, a, op, max(b, 0), c))
        elif style == 1:
            lines.append(f"{a} {op} {b} = {c}")
        elif lang == "zh":
            verb = {"+": "加", "-": "减", "×": "乘"}[op]
            lines.append(f"{a}{verb}{b}等于{c}。" if style == 2 else f"{a}{verb}{b}等于多少？等于{c}。")
        else:
            verb = {"+": "plus", "-": "minus", "×": "times"}[op]
            word = {str(k): w for k, w in enumerate(NUMBERS)} if c <= 20 else {}
            x, y, z = (word.get(str(k), str(k)) for k in (a, b, c))
            lines.append(f"{capital(x)} {verb} {y} is {z}." if style == 2
                         else f"What is {x} {verb} {y}? It is {z}.")
    return "\n".join(lines) if style < 2 else join(lang, lines)


KINDS: tuple[tuple[Generator, int], ...] = (
    (paragraph, 36), (questions, 27), (scene, 15), (comparison, 9), (listing, 3), (arithmetic, 8),
)


def without_contained(documents: list[str]) -> list[str]:
    """Drop documents that lie inside another, since a held-out copy would measure nothing."""
    width = min(map(len, documents), default=0)
    wanted = {text[:width] for text in documents}
    holders: dict[str, list[str]] = {}
    for text in documents:
        for start in range(len(text) - width + 1):
            if (piece := text[start:start + width]) in wanted:
                holders.setdefault(piece, []).append(text)
    return [text for text in documents
            if not any(text != other and text in other for other in holders[text[:width]])]


def make_documents(seed: int = SEED) -> list[str]:
    """Compose both languages' documents up to their share of bytes and mix them."""
    rng = random.Random(seed)
    generators, weights = zip(*KINDS, strict=True)
    documents: dict[str, None] = {}
    for lang in ("en", "zh"):
        size = 0
        while size < BYTES_PER_LANGUAGE:
            text = rng.choices(generators, weights)[0](rng, lang)
            length = len(text.encode())
            if MIN_BYTES <= length <= MAX_BYTES and text not in documents:
                documents[text] = None
                size += length
    kept = without_contained(list(documents))
    rng.shuffle(kept)
    return kept


def write_sample(path: Path, documents: list[str]) -> None:
    """Write the file in one step, so that a reader never meets half a sample."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, suffix=".tmp")
    try:
        with os.fdopen(handle, "w", encoding="utf-8", newline="\n") as stream:
            for text in documents:
                stream.write(json.dumps({"text": text}, ensure_ascii=False) + "\n")
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


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
