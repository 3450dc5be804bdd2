package nb.calib.tagger

/** JSON of plain values: Map, List, String, Double, Boolean and null (RFC 8259). */
object Json {
    fun read(text: String): Any? = Reader(text).whole()

    fun write(value: Any?): String = StringBuilder().also { put(it, value, "") }.toString()

    private fun put(out: StringBuilder, value: Any?, indent: String) {
        when (value) {
            null -> out.append("null")
            is String -> quote(out, value)
            is Float -> put(out, value.toString().toDouble(), indent)
            is Double -> out.append(if (value.isNaN() || value.isInfinite()) "null" else plain(value))
            is Map<*, *> -> block(out, value.entries.toList(), "{}", indent) { (key, item), deeper ->
                quote(out, key.toString())
                out.append(": ")
                put(out, item, deeper)
            }
            is Iterable<*> -> block(out, value.toList(), "[]", indent) { item, deeper -> put(out, item, deeper) }
            else -> out.append(value.toString())
        }
    }

    private fun plain(value: Double) =
        if (value == Math.rint(value) && Math.abs(value) < 1e15) value.toLong().toString() else value.toString()

    private fun <T> block(
        out: StringBuilder, items: List<T>, brackets: String, indent: String, each: (T, String) -> Unit,
    ) {
        if (items.isEmpty()) { out.append(brackets); return }
        val flat = items.all { it is Number }
        val deeper = if (flat) "" else "\n$indent  "
        out.append(brackets[0])
        items.forEachIndexed { k, item ->
            if (k > 0) out.append(if (flat) ", " else ",")
            out.append(deeper)
            each(item, "$indent  ")
        }
        if (!flat) out.append('\n').append(indent)
        out.append(brackets[1])
    }

    private fun quote(out: StringBuilder, text: String) {
        out.append('"')
        for (c in text) when {
            c == '"' || c == '\\' -> out.append('\\').append(c)
            c < ' ' -> out.append("\\u").append(c.code.toString(16).padStart(4, '0'))
            else -> out.append(c)
        }
        out.append('"')
    }

    private class Reader(private val text: String) {
        private var at = 0

        fun whole(): Any? {
            val value = value(0)
            space()
            if (at != text.length) bad()
            return value
        }

        private fun bad(): Nothing = throw IllegalArgumentException("not JSON at character $at")

        private fun space() { while (at < text.length && text[at] in " \t\r\n") at++ }

        private fun peek(): Char = if (at < text.length) text[at] else bad()

        private fun take(c: Char) { if (peek() != c) bad() else at++ }

        private fun value(depth: Int): Any? {
            if (depth > 64) bad()
            space()
            return when (peek()) {
                '{' -> LinkedHashMap<String, Any?>().also { map ->
                    items('}') { space(); val key = string(); space(); take(':'); map[key] = value(depth + 1) }
                }
                '[' -> ArrayList<Any?>().also { list -> items(']') { list.add(value(depth + 1)) } }
                '"' -> string()
                't' -> word("true", true)
                'f' -> word("false", false)
                'n' -> word("null", null)
                else -> number()
            }
        }

        private fun items(end: Char, item: () -> Unit) {
            at++
            space()
            if (peek() == end) { at++; return }
            while (true) {
                item()
                space()
                if (peek() == end) { at++; return }
                take(',')
            }
        }

        private fun <T> word(word: String, value: T): T {
            if (!text.startsWith(word, at)) bad()
            at += word.length
            return value
        }

        private fun number(): Double {
            val start = at
            while (at < text.length && text[at] in "+-.0123456789eE") at++
            return text.substring(start, at).toDoubleOrNull() ?: bad()
        }

        private fun string(): String {
            take('"')
            val out = StringBuilder()
            while (true) {
                val c = peek()
                at++
                if (c == '"') return out.toString()
                if (c != '\\') { out.append(c); continue }
                val escape = peek()
                at++
                out.append(
                    when (escape) {
                        'n' -> '\n'
                        't' -> '\t'
                        'r' -> '\r'
                        'b' -> '\b'
                        'f' -> '\u000c'
                        'u' -> {
                            val code = if (at + 4 <= text.length) text.substring(at, at + 4).toIntOrNull(16) else null
                            at += 4
                            (code ?: bad()).toChar()
                        }
                        else -> escape
                    }
                )
            }
        }
    }
}
