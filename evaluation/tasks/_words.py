"""Words to make keys, values, names and sentences from."""

from __future__ import annotations

from random import Random
from typing import Final


def _split(text: str) -> tuple[str, ...]:
    return tuple(text.split())


ADJECTIVES: Final = _split(
    """
    able amber ancient autumn bitter bold brave breezy bright brisk broad calm careful cheerful
    clever cloudy coastal copper cosy crimson crisp curious daring deep dusty eager early easy
    faint fair famous fancy fertile fierce firm flat fond formal fresh frosty gentle gilded glad
    golden grand grateful green handy happy hardy hazy heavy hidden hollow humble icy idle jolly
    keen kind large late lazy leafy light lively lone long loyal lucky lunar mellow merry mighty
    mild misty modest narrow neat nimble noble northern odd olive open orange pale patient
    placid plain polite proud purple quaint quick quiet rapid rare ready regal ripe robust rocky
    rosy rough round royal rural rusty sandy scarlet secret shady sharp shiny silent silver
    simple slim slow small smooth snowy soft solar solid southern spare spicy steady steep stern
    stony stout strong sunny sweet swift tall tame tender thin tidy tiny tranquil upper useful
    vast velvet violet vivid warm wary western wide wild windy wise witty wooden young zesty
    """
)

NOUNS: Final = _split(
    """
    acorn anchor apple apron arrow badge bakery balcony barrel basket beacon beetle bell bench
    blanket boat bottle boulder bridge brook broom bucket button cabin cable camera candle canoe
    canyon carpet castle cavern cellar chapel cherry chimney circle cliff clock cloud compass
    copper corner cottage cradle crane creek crown curtain daisy desert diary dolphin donkey
    door drum eagle elbow engine falcon feather fence ferry field flag flute forest fountain fox
    galaxy garden gate glacier glove goose grape guitar hammer harbor harvest hedge helmet heron
    hill honey horse igloo island ivory jacket jar jewel journal kettle key kitchen kite ladder
    lagoon lake lantern lemon letter library lighthouse lily lizard locket magnet maple marble
    market meadow melon mill mirror mountain museum needle nest notebook oak oar ocean orchard
    otter oven owl paddle painting palace parrot path pebble pencil piano pillow pine planet
    plaza pocket pond poppy prairie puzzle quarry quill rabbit raft rail ranch raven ribbon
    river road robin roof rope saddle sail school shell shelter shore shovel sparrow spoon
    spring station statue stone stool storm stove summit swan table temple thread throne tiger
    timber tower trail tram trumpet tulip tunnel turtle umbrella valley vase village violin
    wagon walnut well whale wheel willow window winter
    """
)

FIRST_NAMES: Final = _split(
    """
    Ada Alan Amira Anton Astrid Boris Bruno Carla Cedric Chloe Clara Daria Dina Edgar Elena Elif
    Emil Fatima Felix Flora Greta Gustav Hana Hugo Ida Igor Ines Irene Ivan Jana Jonas Julia
    Karim Katya Klaus Lars Leila Leo Lina Luis Mara Marco Maya Milan Mona Nadia Nils Nora Olga
    Omar Oskar Paula Petra Pia Rafael Rosa Ruth Samir Selma Simon Sofia Stefan Tara Teo Tilda
    Ulla Vera Victor Wanda Yara Yusuf Zoe
    """
)

LAST_NAMES: Final = _split(
    """
    Abbott Acker Adler Bauer Becker Bloom Brandt Castell Conti Dahl Demir Dorn Eklund Ferrer
    Fischer Garnier Gruber Halim Hansen Holm Ibarra Iversen Jansen Keller Kovac Lang Lindt Lopez
    Marek Meyer Moreau Nagy Novak Okafor Olsen Orlov Pavel Petit Quist Ramos Reyes Ritter Rossi
    Sato Silva Sommer Sorel Stern Tanaka Thorn Urban Vance Varga Vidal Weber Winter Yilmaz
    Zeller
    """
)

PLACES: Final = _split(
    """
    Alderton Ashford Belmont Birchwood Bramley Brookfield Carrick Cedarville Clearwater Copley
    Dunmore Eastbrook Elmsworth Fairhaven Fernley Foxdale Glenmore Greyport Halden Hartwell
    Hazelton Ironbridge Kingsley Lakeview Langford Larkspur Maplewood Marlow Millbrook Northgate
    Oakhurst Pinecrest Quarrystone Ravenhill Redcliff Riverton Rosedale Saltmarsh Silverton
    Stonefield Summerset Thornbury Underhill Valemont Westerly Whitecliff Willowbank Yarrow
    """
)

JOBS: Final = _split(
    """
    architect astronomer baker beekeeper blacksmith botanist carpenter cartographer chemist
    clockmaker composer cook dentist engineer farmer florist geologist glassblower historian
    jeweller judge librarian mechanic midwife miller musician nurse painter pharmacist
    photographer pilot potter printer sailor sculptor surgeon surveyor tailor teacher translator
    vet weaver zoologist
    """
)


def distinct_keys(random: Random, count: int) -> list[str]:
    """`count` different keys such as `silver-lantern`."""
    chosen: set[str] = set()
    keys: list[str] = []
    while len(keys) < count:
        key = f"{random.choice(ADJECTIVES)}-{random.choice(NOUNS)}"
        if key not in chosen:
            chosen.add(key)
            keys.append(key)
    return keys


def distinct_numbers(random: Random, count: int) -> list[str]:
    """`count` different numbers of seven digits, as RULER has them."""
    return [str(n) for n in random.sample(range(1_000_000, 10_000_000), count)]


def distinct_uuids(random: Random, count: int) -> list[str]:
    """`count` random identifiers of 32 hexadecimal digits in UUID form."""
    raw = [f"{random.getrandbits(128):032x}" for _ in range(count)]
    return [f"{x[:8]}-{x[8:12]}-{x[12:16]}-{x[16:20]}-{x[20:]}" for x in raw]
