"""A few real texts for the parity command, of mixed length, language and script, and some for the demo."""

QUERIES = ["What is the capital of China?", "Explain gravity", "Wie backt man Brot?"]

DOCUMENTS = [
    "The capital of China is Beijing.",
    "Gravity is a force that attracts two bodies towards each other. It gives weight to physical objects and is "
    "responsible for the movement of planets around the sun.",
    "Brot entsteht aus Mehl, Wasser, Salz und Hefe. Der Teig ruht, bis er sich verdoppelt hat, und wird dann bei "
    "220 °C gebacken, bis die Kruste hohl klingt.",
    "北京是中华人民共和国的首都，位于华北平原北部。",
    "تدور الأرض حول الشمس بفعل الجاذبية.",
    "def fall(t, g=9.81):\n    return 0.5 * g * t**2  # metres after t seconds\n",
]

LONG_DOCUMENT = " ".join(DOCUMENTS[:3] * 4)

DEMO_QUERY = "a musical instrument with strings"
DEMO_DOCUMENTS = [
    "The bakery on the corner sells fresh bread and cakes every morning.",
    "My grandmother taught me to play the violin when I was six.",
    "Heavy rain flooded the road to the village last night.",
    "The bank raised its interest rates for the third time this year.",
    "She tuned her old guitar and sang two songs.",
    "A black cat slept on the warm roof of the car.",
]
