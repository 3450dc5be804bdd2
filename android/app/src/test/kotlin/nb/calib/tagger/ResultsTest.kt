package nb.calib.tagger

import kotlin.test.Test
import kotlin.test.assertEquals
import kotlin.test.assertTrue

class ResultsTest {
    private val spec = TaggerSpec("resnet18", listOf("disc", "ring", "bar"), 8, 0.875)

    private fun photo(name: String, at: Double, run: Double) =
        PhotoResult(name, at, 2.0, 1.0, run, floatArrayOf(2f, -2f, 0.5f))

    private fun report(vararg runs: Double) = Report(
        spec, Plan(), runs.mapIndexed { k, run -> photo("p${k % 2}", k.toDouble(), run) }, listOf("broken.jpg"), 9.0,
        listOf(0.0 to Health(80, -300000, 31.5f, 0), 9.0 to Health()),
    )

    @Test
    fun quantilesAreThoseOfNumPy() {
        val values = doubleArrayOf(4.0, 1.0, 3.0, 10.0)
        assertEquals(2.5, Numbers.quantile(values, 0.25))
        assertEquals(3.5, Numbers.quantile(values, 0.5))
        assertEquals(5.5, Numbers.quantile(values, 0.75))
        assertTrue(Numbers.quantile(doubleArrayOf(), 0.5).isNaN())
    }

    @Test
    fun tagsAreTheLikeliestFirst() {
        val tags = photo("p", 0.0, 1.0).tags(spec.classes, 0.5f)
        assertEquals(listOf("disc", "bar"), tags.map { it.name })
        assertEquals(0.8807971f, tags[0].probability)
    }

    @Test
    fun throttlingIsTheLastFifthByTheFirst() {
        assertEquals(1.5, report(2.0, 2.0, 2.0, 2.0, 2.5, 2.5, 2.5, 2.5, 3.0, 3.0).throttling)
        assertEquals(1.0, report(2.0).throttling)
    }

    @Test
    fun aReportHoldsEachPhotoOnce() {
        val map = Json.read(Json.write(report(2.0, 4.0, 6.0).toMap(linkedMapOf("backends" to listOf("XnnpackBackend"))))) as Map<*, *>
        assertEquals(listOf("p0", "p1"), (map["photos"] as List<*>).map { (it as Map<*, *>)["name"] })
        assertEquals<Any?>(listOf(0.0, 1.0, 2.0), (map["series"] as Map<*, *>)["at"])
        assertEquals<Any?>(4.0, ((map["ms"] as Map<*, *>)["run"] as Map<*, *>)["median"])
        assertEquals<Any?>(7.0, ((map["ms"] as Map<*, *>)["total"] as Map<*, *>)["median"])
        assertEquals<Any?>(listOf("disc", "bar"), ((map["photos"] as List<*>)[0] as Map<*, *>)["tags"])
        val health = map["health"] as List<*>
        assertEquals<Any?>(31.5, (health[0] as Map<*, *>)["battery_celsius"])
        assertEquals<Any?>(null, (health[1] as Map<*, *>)["thermal_status"])
    }

    @Test
    fun axesHaveRoundTicksAndHoldEveryValue() {
        for (top in listOf(0.04, 0.9, 6.2, 19.0, 260.0)) {
            val axes = Axes(doubleArrayOf(0.0, 30.0), doubleArrayOf(top / 2, top))
            assertTrue(axes.y(top) in 0.65..1.0, "$top")
            assertTrue(axes.ticks.size in 3..6 && axes.ticks[0] == 0.0, "$top: ${axes.ticks}")
            assertEquals(1.0, axes.x(30.0))
        }
        assertEquals(listOf("0", "2", "4", "6", "8"), Axes(doubleArrayOf(1.0), doubleArrayOf(6.2)).let { a -> a.ticks.map { a.label(it) } })
        assertEquals("0.05", Axes(doubleArrayOf(), doubleArrayOf()).label(0.05))
    }
}
