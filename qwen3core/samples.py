"""A few real texts for the demo and the parity command, of mixed length, language and script."""

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
