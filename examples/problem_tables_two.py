"""The kinds of word problem that take two steps; the notation is that of `problem_tables`."""

from examples.problem_tables import Kind

TWO_STEP = (
    Kind(
        "buy_then_give",
        "x=5..50 y=3..40 z=2..60",
        (
            (
                "{A} has {x} {things}. {He} (buys|finds|gets) {y} more and then gives {z} to {B}. "
                "How many {things} does {A} have now?",
                "With the new ones {A} has [s=x+y] {things}.\n{He} has [t=s-z] {things} now.",
            ),
            (
                "{A} bought {x} {goods} on Monday and {y} {goods} on Tuesday. "
                "{He} lost {z} of them. How many {goods} does {A} have left?",
                "{A} bought [s=x+y] {goods}.\n{He} has [t=s-z] {goods} left.",
            ),
            (
                "{A} picks {x} {fruits} and {B} picks {y} {fruits}. They eat {z} of them. "
                "How many {fruits} are left?",
                "They pick [s=x+y] {fruits}.\nThey have [t=s-z] {fruits} left.",
            ),
            (
                "A bus has {x} people on it. At {place}, {y} people get on. "
                "Then {z} people get off. How many people are on the bus now?",
                "After {y} people get on there are [s=x+y] people.\n"
                "Now there are [t=s-z] people on the bus.",
            ),
            (
                "{A} gave {z} {things} to {B}. Before that {he} had {x} {things} in a {box} "
                "and {y} in a {box2}. How many {things} does {A} have now?",
                "{A} had [s=x+y] {things} before.\n{He} has [t=s-z] {things} now.",
            ),
        ),
    ),
    Kind(
        "take_twice",
        "x=20..99 y=3..40 z=3..40",
        (
            (
                "{A} has {x} {things}. {He} gives {y} to {B} and loses {z}. "
                "How many {things} does {A} have left?",
                "After giving {y} away {A} has [s=x-y] {things}.\n{He} has [t=s-z] {things} left.",
            ),
            (
                "{A} baked {x} {treats}. {He} sold {y} in the morning and {z} in the afternoon. "
                "How many {treats} are left?",
                "After the morning there are [s=x-y] {treats}.\nThere are [t=s-z] {treats} left.",
            ),
            (
                "{A} has to read {x} pages. {He} read {y} pages (on Monday|yesterday) "
                "and {z} pages today. How many pages are left to read?",
                "After the first day [s=x-y] pages are left.\nNow [t=s-z] pages are left to read.",
            ),
            (
                "{A} saved {x} dollars. {He} spent ${y} on a (hat|lamp|game) "
                "and ${z} on a (book|bag|scarf). How much money does {A} have left?",
                "First {A} has [s=x-y] dollars left.\nThen {he} has [t=s-z] dollars left.",
            ),
            (
                "{B} took {y} {things} and {A} took {z} {things} from a {box}. "
                "The {box} had {x} {things} at first. How many {things} are in the {box} now?",
                "After {B} there are [s=x-y] {things}.\nNow the {box} has [t=s-z] {things}.",
            ),
        ),
    ),
    Kind(
        "times_then_add",
        "n=2..12 x=2..10 y=2..40",
        (
            (
                "{A} has {n} {boxes} with {x} {things} in each {box}. {He} also has {y} {things} "
                "at home. How many {things} does {A} have in all?",
                "The {boxes} hold [s=n*x] {things}.\n{A} has [t=s+y] {things} in all.",
            ),
            (
                "{A} has {y} {things}. {He} buys {n} {boxes} of {things}. Each {box} holds {x}. "
                "How many {things} does {A} have now?",
                "{A} buys [s=n*x] {things}.\n{He} has [t=s+y] {things} now.",
            ),
            (
                "{A} buys {n} {goods} at {shop} for ${x} each and a (hat|lamp|bag) for ${y}. "
                "How much does {he} spend?",
                "The {goods} cost [s=n*x] dollars.\n{A} spends [t=s+y] dollars.",
            ),
            (
                "{A} had {y} {things} and then (got|found) {x} {things} every day "
                "for {n} days. How many {things} did {A} have in the end?",
                "In {n} days that is [s=n*x] {things}.\n{A} had [t=s+y] {things} in the end.",
            ),
            (
                "{A} puts {n} rows of {x} chairs in the hall. {y} more chairs stand outside. "
                "How many chairs are there in total?",
                "The rows have [s=n*x] chairs.\nThere are [t=s+y] chairs in total.",
            ),
        ),
    ),
    Kind(
        "times_then_subtract",
        "n=2..12 x=2..10 y=2..50",
        (
            (
                "{A} buys {n} {boxes} of {things}. There are {x} {things} in each {box}. "
                "{He} gives {y} {things} to {B}. How many {things} does {A} have left?",
                "{A} buys [s=n*x] {things}.\n{He} has [t=s-y] {things} left.",
            ),
            (
                "{A} bakes {n} trays of {x} {treats}. {His} {friends} eat {y} of them. "
                "How many {treats} are left?",
                "{A} bakes [s=n*x] {treats}.\nThere are [t=s-y] {treats} left.",
            ),
            (
                "{A} earns {x} dollars an hour. {He} works {n} hours and spends {y} dollars "
                "at {shop}. How many dollars does {A} have left?",
                "{A} earns [s=n*x] dollars.\n{He} has [t=s-y] dollars left.",
            ),
            (
                "{y} of the {flowers} in the garden are open. The garden has {n} rows with "
                "{x} {flowers} each. How many {flowers} are still closed?",
                "There are [s=n*x] {flowers}.\n[t=s-y] {flowers} are still closed.",
            ),
            (
                "{A} wants to (make|collect) {x} {goods} a day for {n} days. "
                "{He} has {y} {goods} so far. How many {goods} are still missing?",
                "{A} wants [s=n*x] {goods}.\n{He} still needs [t=s-y] {goods}.",
            ),
        ),
    ),
    Kind(
        "change",
        "m=20|50|100 n=2..9 p=2..12",
        (
            (
                "{A} buys {n} {things} for ${p} each. {He} pays with a ${m} bill. "
                "How much change does {he} get?",
                "The {things} cost [s=n*p] dollars.\n{A} gets [t=m-s] dollars back.",
            ),
            (
                "{A} goes to {shop} with {m} dollars. {He} buys {n} {goods} that cost {p} dollars "
                "each. How many dollars does {A} have left?",
                "The {goods} cost [s=n*p] dollars.\n{A} has [t=m-s] dollars left.",
            ),
            (
                "One {box} of {foods} costs {p} dollars. {A} has {m} dollars and buys {n} {boxes}. "
                "How much money is left?",
                "The {boxes} cost [s=n*p] dollars.\nThere are [t=m-s] dollars left.",
            ),
            (
                "At the (museum|zoo|theater) a ticket costs ${p}. {A} pays for {n} people "
                "and gives ${m}. How many dollars does {A} get back?",
                "The tickets cost [s=n*p] dollars.\n{A} gets [t=m-s] dollars back.",
            ),
        ),
    ),
    Kind(
        "add_then_share",
        "n=2..10 q=2..10 s=n*q x=2..80 y=s-x",
        (
            (
                "{A} has {x} {things} and {B} has {y} {things}. They put them together and share "
                "them equally among {n} {friends}. How many {things} does each {friend} get?",
                "Together they have [s=x+y] {things}.\nEach {friend} gets [t=s/n] {things}.",
            ),
            (
                "{A} picks {x} {flowers} and {y} {flowers2}. {He} makes {n} equal bunches. "
                "How many flowers are in each bunch?",
                "{A} picks [s=x+y] flowers.\nEach bunch has [t=s/n] flowers.",
            ),
            (
                "{A} has {x} {foods} and {y} {foods2}. {He} puts them into {n} {boxes}, "
                "the same number in each. How many pieces are in each {box}?",
                "{A} has [s=x+y] pieces.\nEach {box} has [t=s/n] pieces.",
            ),
            (
                "At {A}'s school {x} girls and {y} boys play ball. They make {n} equal teams. "
                "How many children are in each team?",
                "There are [s=x+y] children.\nEach team has [t=s/n] children.",
            ),
        ),
    ),
    Kind(
        "share_then_take",
        "n=2..10 q=3..12 x=n*q y=2..10",
        (
            (
                "{A} and {his} {friends} share {x} {foods} equally. They are {n} people. "
                "{A} eats {y} of {his} {foods}. How many {foods} does {A} have left?",
                "Each one gets [s=x/n] {foods}.\n{A} has [t=s-y] {foods} left.",
            ),
            (
                "{A} puts {x} {things} into {n} {boxes}, the same number in each {box}. "
                "Then {he} takes {y} {things} out of one {box}. "
                "How many {things} are left in that {box}?",
                "Each {box} gets [s=x/n] {things}.\nThat {box} has [t=s-y] {things} left.",
            ),
            (
                "A class of {x} children is divided into {n} equal teams. {y} children in "
                "{A}'s team go home. How many children are left in that team?",
                "Each team has [s=x/n] children.\nThat team has [t=s-y] children left.",
            ),
            (
                "{A} gets an equal share of {x} dollars for {n} people. {He} spends {y} dollars "
                "at {shop}. How many dollars does {A} have left?",
                "{A} gets [s=x/n] dollars.\n{He} has [t=s-y] dollars left.",
            ),
        ),
    ),
    Kind(
        "more_then_total",
        "x=3..40 y=2..20",
        (
            (
                "{B} has {x} {things}. {A} has {y} more {things} than {B}. "
                "How many {things} do they have (together|in all)?",
                "{A} has [s=x+y] {things}.\nTogether they have [t=x+s] {things}.",
            ),
            (
                "{A} picked {y} more {fruits} than {B}. {B} picked {x} {fruits}. "
                "How many {fruits} did they pick together?",
                "{A} picked [s=x+y] {fruits}.\nTogether they picked [t=x+s] {fruits}.",
            ),
            (
                "{A} (read|wrote) {x} pages on Monday and {y} more pages than that on Tuesday. "
                "How many pages is that in total?",
                "On Tuesday it was [s=x+y] pages.\nIn total that is [t=x+s] pages.",
            ),
            (
                "A farm has {x} {animals}. It has {y} more {animals2} than {animals}. "
                "How many animals are there in total?",
                "There are [s=x+y] {animals2}.\nThere are [t=x+s] animals in total.",
            ),
        ),
    ),
    Kind(
        "fewer_then_total",
        "x=5..50 y=2..30",
        (
            (
                "{B} has {x} {things}. {A} has {y} fewer {things} than {B}. "
                "How many {things} do they have (together|in all)?",
                "{A} has [s=x-y] {things}.\nTogether they have [t=x+s] {things}.",
            ),
            (
                "{A} sold {y} fewer {foods} than {B}. {B} sold {x} {foods}. "
                "How many {foods} did they sell in all?",
                "{A} sold [s=x-y] {foods}.\nIn all they sold [t=x+s] {foods}.",
            ),
            (
                "One {box} has {x} {goods}. Another {box} has {y} fewer {goods}. "
                "How many {goods} are in both {boxes}?",
                "The other {box} has [s=x-y] {goods}.\nBoth {boxes} have [t=x+s] {goods}.",
            ),
            (
                "{A} ran {x} minutes on Friday and {y} minutes less on Sunday. "
                "How many minutes did {he} run in total?",
                "On Sunday {A} ran [s=x-y] minutes.\nIn total {he} ran [t=x+s] minutes.",
            ),
        ),
    ),
    Kind(
        "times_as_many",
        "k=2..6 x=2..12",
        (
            (
                "{B} has {x} {things}. {A} has {times} as many {things} as {B}. "
                "How many {things} do they have together?",
                "{A} has [s=k*x] {things}.\nTogether they have [t=x+s] {things}.",
            ),
            (
                "{A} found {times} as many {things} as {B}. {B} found {x} {things}. "
                "How many {things} did they find in all?",
                "{A} found [s=k*x] {things}.\nIn all they found [t=x+s] {things}.",
            ),
            (
                "{A} has a farm with {x} {animals} and {times} as many {animals2}. "
                "How many animals does {A} have?",
                "There are [s=k*x] {animals2}.\n{A} has [t=x+s] animals.",
            ),
            (
                "At {shop} one {good} costs ${x}. A lamp costs {times} as much. "
                "How much do both cost together?",
                "The lamp costs [s=k*x] dollars.\nBoth cost [t=x+s] dollars.",
            ),
        ),
    ),
    Kind(
        "half",
        "h=2..40 x=h*2 y=2..40",
        (
            (
                "{A} has {x} {things}. {He} gives half of them to {B}. Then {he} buys {y} more. "
                "How many {things} does {A} have now?",
                "{A} keeps [s=x/2] {things}.\n{He} has [t=s+y] {things} now.",
            ),
            (
                "{A} gets {y} {things} from {B}. Before that {he} sold half of {his} {x} {things}. "
                "How many {things} does {A} have now?",
                "{A} had [s=x/2] {things} left.\n{He} has [t=s+y] {things} now.",
            ),
            (
                "Half of the {x} {foods} in the {box} are eaten. "
                "{A} puts {y} {foods} into the {box}. How many {foods} are in the {box} now?",
                "There are [s=x/2] {foods} left.\nNow there are [t=s+y] {foods} in the {box}.",
            ),
            (
                "{B} has {x} {things}. {A} has half as many and gets {y} more. "
                "How many {things} does {A} have now?",
                "{A} has [s=x/2] {things} at first.\n{He} has [t=s+y] {things} now.",
            ),
        ),
    ),
    Kind(
        "age",
        "x=5..40 y=2..20 z=2..20",
        (
            (
                "{B} is {x} years old. {A} is {y} years older than {B}. "
                "How old will {A} be in {z} years?",
                "{A} is [s=x+y] years old now.\nIn {z} years {he} will be [t=s+z] years old.",
            ),
            (
                "{A} is {y} years older than {B}, who is {x} years old. "
                "What will {A}'s age be {z} years from now?",
                "{A} is [s=x+y] years old now.\nIn {z} years {he} will be [t=s+z] years old.",
            ),
            (
                "In {z} years {A} will have a big party. {He} is {y} years older than {B}. "
                "{B} is {x} years old now. How old will {A} be at the party?",
                "{A} is [s=x+y] years old now.\nAt the party {he} will be [t=s+z] years old.",
            ),
            (
                "{A} was {x} years old when {he} moved to a new house. {He} stayed there {y} years "
                "and then lived near {place} for {z} years. How old is {A} now?",
                "{A} left the house at the age of [s=x+y] years.\n{He} is [t=s+z] years old now.",
            ),
        ),
    ),
    Kind(
        "week",
        "x=2..12 y=2..40",
        (
            (
                "{A} reads {x} pages every day. {He} has read {y} pages before. "
                "How many pages will {he} have read after one week?",
                "In a week {A} reads [s=x*7] pages.\nIn all that is [t=s+y] pages.",
            ),
            (
                "{A} starts the week with {y} {things} and (gets|buys) {x} {things} a day. "
                "How many {things} does {he} have after 7 days?",
                "In a week that is [s=x*7] {things}.\n{A} has [t=s+y] {things} after 7 days.",
            ),
            (
                "{A}'s hens lay {x} eggs every day. There are {y} eggs in {his} kitchen. "
                "How many eggs are there after a week?",
                "In a week that is [s=x*7] eggs.\nThen there are [t=s+y] eggs.",
            ),
            (
                "{A} saves {x} dollars each day. {He} already has {y} dollars. "
                "How much money will {A} have after one week?",
                "In a week {A} saves [s=x*7] dollars.\nThen {he} has [t=s+y] dollars.",
            ),
        ),
    ),
)
