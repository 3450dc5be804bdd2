package nb.calib.tagger

import kotlin.test.Test
import kotlin.test.assertEquals
import kotlin.test.assertFailsWith
import kotlin.test.assertTrue

class EngineTest {
    private val spec = TaggerSpec("resnet18", listOf("disc", "ring"), 4, 1.0)
    private var now = 0L

    /** A network that takes [ms] milliseconds of the test's own clock. */
    private inner class Fake(var ms: Double, val scores: Int = 2, val fail: Throwable? = null) : Net {
        override val backends = listOf("FakeBackend")
        var calls = 0
        override fun run(input: FloatArray): FloatArray {
            assertEquals(3 * 4 * 4, input.size)
            calls++
            now += (ms * 1e6).toLong()
            fail?.let { throw it }
            return FloatArray(scores) { input[0] + it }
        }
        override fun close() {}
    }

    private inner class Drawn(override val name: String, val broken: Throwable? = null) : Photo {
        override fun load(): Pixels {
            now += 2_000_000
            broken?.let { throw it }
            return Pixels(5, 6, IntArray(30) { 0x804020 * (it % 2) })
        }
    }

    private fun engine(net: Net, monitor: Monitor = Monitor { Health() }) = Engine(net, spec, monitor) { now }

    private val photos = List(3) { Drawn("p$it") }

    @Test
    fun decodePreprocessAndRunAreTimedApart() {
        val net = Fake(7.0)
        val report = engine(net).benchmark(photos, Plan(warmup = 4, runs = 3))
        assertEquals(4 + 3 * 3, net.calls)
        assertEquals(listOf(2.0, 0.0, 7.0, 9.0), listOf(report.decode, report.preprocess, report.run, report.total).map { it.median })
        assertEquals(3 * (2.0 + 21.0) / 1000, report.seconds, 1e-9)
        assertEquals(listOf("p0", "p1", "p2"), report.results.map { it.name })
    }

    @Test
    fun theTimeOfAPhotoIsTheMedianOfItsRuns() {
        val net = object : Net {
            val times = ArrayDeque(listOf(1.0, 50.0, 2.0))
            override val backends = emptyList<String>()
            override fun run(input: FloatArray): FloatArray { now += (times.removeFirst() * 1e6).toLong(); return FloatArray(2) }
            override fun close() {}
        }
        assertEquals(2.0, engine(net).benchmark(photos.take(1), Plan(warmup = 0, runs = 3)).run.median)
    }

    @Test
    fun photosAreRepeatedUntilTheStatedTime() {
        val heat = ArrayDeque(listOf(0, 1, 2, 3, 3, 3, 3, 3))
        val report = engine(Fake(998.0), Monitor { Health(thermal = heat.removeFirst()) })
            .benchmark(photos, Plan(warmup = 0, runs = 1, seconds = 20))
        assertEquals(20, report.results.size)
        assertEquals(3, report.photos.size)
        assertEquals(listOf(0.0, 5.0, 10.0, 15.0, 20.0), report.health.map { Math.rint(it.first) })
        assertEquals(listOf<Int?>(0, 1, 2, 3, 3), report.health.map { it.second.thermal })
    }

    @Test
    fun everyPhotoIsSeenOnceEvenWhenTimeIsShort() =
        assertEquals(3, engine(Fake(5000.0)).benchmark(photos, Plan(warmup = 0, runs = 1, seconds = 1)).results.size)

    @Test
    fun unreadablePhotosAreLeftOutByName() {
        val bad = Drawn("bad.jpg", Refusal(Fault.PHOTO_UNREADABLE, "bad.jpg"))
        val report = engine(Fake(1.0)).benchmark(listOf(bad) + photos, Plan())
        assertEquals(listOf("bad.jpg"), report.unreadable)
        assertEquals(3, report.results.size)
        val refused = assertFailsWith<Refusal> { engine(Fake(1.0)).benchmark(listOf(bad), Plan()) }
        assertEquals(Fault.PHOTO_UNREADABLE to "bad.jpg", refused.fault to refused.detail)
    }

    @Test
    fun onlyUnreadablePhotosEndAlsoWithAStatedTime() {
        val bad = Drawn("bad.jpg", Refusal(Fault.PHOTO_UNREADABLE, "bad.jpg"))
        assertFailsWith<Refusal> { engine(Fake(1.0)).benchmark(listOf(bad), Plan(seconds = 60)) }
    }

    @Test
    fun whatGoesWrongIsAFault() {
        val cases = listOf(
            Fake(1.0, fail = OutOfMemoryError()) to Fault.OUT_OF_MEMORY,
            Fake(1.0, fail = IllegalStateException("delegate")) to Fault.RUN_FAILED,
            Fake(1.0, scores = 3) to Fault.LABELS_DIFFER,
        )
        for ((net, fault) in cases) {
            assertEquals(fault, assertFailsWith<Refusal> { engine(net).benchmark(photos, Plan()) }.fault)
        }
        assertEquals(Fault.NO_PHOTOS, assertFailsWith<Refusal> { engine(Fake(1.0)).benchmark(emptyList(), Plan()) }.fault)
        val huge = Drawn("huge.jpg", OutOfMemoryError())
        assertEquals(Fault.OUT_OF_MEMORY, assertFailsWith<Refusal> { engine(Fake(1.0)).benchmark(listOf(huge), Plan()) }.fault)
    }

    @Test
    fun aStopKeepsWhatWasMeasured() {
        var seen = 0
        val report = engine(Fake(1.0)).benchmark(photos, Plan(seconds = 60), { visits, _ -> seen = visits }, { seen == 2 })
        assertEquals(2, report.results.size)
        assertTrue(engine(Fake(1.0)).benchmark(photos, Plan(), cancelled = { true }).results.isEmpty())
    }
}
