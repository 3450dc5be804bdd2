package nb.calib.tagger

import kotlin.test.Test
import kotlin.test.assertEquals
import kotlin.test.assertFailsWith

class JsonTest {
    @Test
    fun whatIsWrittenIsReadBack() {
        val value = linkedMapOf(
            "text" to "a \"quote\", \\ and \u0001 태그", "numbers" to listOf(1.0, -2.5, 1e-9), "none" to null,
            "yes" to true, "empty" to emptyList<Any>(), "inner" to linkedMapOf("a" to listOf("b", emptyMap<String, Any>())),
        )
        assertEquals<Any?>(value, Json.read(Json.write(value)))
    }

    @Test
    fun floatsAreWrittenAsTheyAreShown() = assertEquals("[0.1, 3]", Json.write(listOf(0.1f, 3)))

    @Test
    fun whatIsNoNumberIsNull() = assertEquals("[null, null]", Json.write(listOf(Double.NaN, Double.POSITIVE_INFINITY)).replace("\n", "").replace("  ", " ").replace("[ ", "[").replace(" ]", "]"))

    @Test
    fun escapesOfPythonAreUnderstood() = assertEquals("é\n/", Json.read("\"\\u00e9\\n\\/\""))

    @Test
    fun brokenTextsAreRefused() {
        val deep = "[".repeat(1000)
        for (text in listOf("", "{", "[1,]", "nul", "\"open", "{\"a\" 1}", "1 2", "\"\\u00", "+", deep)) {
            assertFailsWith<IllegalArgumentException>(text) { Json.read(text) }
        }
    }
}
