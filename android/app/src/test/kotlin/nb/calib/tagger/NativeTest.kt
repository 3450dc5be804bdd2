package nb.calib.tagger

import java.io.File
import java.io.RandomAccessFile
import java.nio.ByteBuffer
import java.nio.ByteOrder
import kotlin.test.Test
import kotlin.test.assertEquals
import kotlin.test.assertFailsWith
import kotlin.test.assertTrue

/** The app's own way of running a program, on the x86_64 library in this JVM; Python wrote inputs and wanted scores. */
class NativeTest {
    private val folder = File(System.getProperty("programs"))
    private fun floats(name: String): FloatArray {
        val buffer = ByteBuffer.wrap(File(folder, name).readBytes()).order(ByteOrder.LITTLE_ENDIAN).asFloatBuffer()
        return FloatArray(buffer.remaining()) { buffer.get(it) }
    }

    private fun top(scores: FloatArray) = scores.indices.sortedByDescending { scores[it] }.take(5)

    /** Within so many output steps, and the same top five but for scores that are as near as that. */
    private fun check(name: String, steps: Int): List<Double> {
        val file = File(folder, "$name.pte")
        val program = Program.read(ByteBuffer.wrap(file.readBytes()))
        val (inputs, wanted) = floats("$name.inputs") to floats("$name.scores")
        val (length, classes) = program.input.reduce(Int::times) to program.spec().classes.size
        val step = (Json.read(File(folder, "$name.pte.json").readText()) as Map<*, *>)["step"] as Double
        val differences = ArrayList<Double>()
        ModuleNet.open(file.path, program).use { net ->
            assertEquals(listOf("XnnpackBackend"), net.backends)
            for (k in 0 until inputs.size / length) {
                val scores = net.run(inputs.copyOfRange(k * length, (k + 1) * length))
                val there = wanted.copyOfRange(k * classes, (k + 1) * classes)
                for (c in scores.indices) differences.add(Math.abs(scores[c] - there[c]) / step)
                for ((a, b) in top(there).zip(top(scores))) assertTrue(there[a] - there[b] <= steps * step * 1.001)
            }
        }
        println("$name: ${inputs.size / length} inputs, largest difference ${differences.max()} steps of $step")
        assertTrue(differences.max() <= steps * 1.001, "$name: ${differences.max()} steps")
        return differences
    }

    @Test
    fun theDemoTaggersScoresAreThoseOfPythonsRuntime() { check("int8", 1) }

    @Test
    fun aFloatProgramsScoresAreThoseOfPythonsRuntime() { check("fp32", 1) }

    /** Random weights amplify what two versions of XNNPACK round apart inside: a few scores are two steps away. */
    @Test
    fun randomWeightsStayWithinTwoSteps() = assertTrue(check("random", 2).count { it > 1.5 } < 40)

    @Test
    fun theLibrarySaysWhichBackendsItHas() = assertEquals(listOf("XnnpackBackend"), ModuleNet.registered())

    @Test
    fun aBenchmarkRunsFromPixelsToReport() {
        val file = File(folder, "int8.pte")
        val program = Program.read(ByteBuffer.wrap(file.readBytes()))
        val photos = List(4) { k ->
            object : Photo {
                override val name = "p$k"
                override fun load() = Pixels(70, 50, IntArray(3500) { (it * 7919 + k * 104729) and 0xffffff })
            }
        }
        ModuleNet.open(file.path, program).use { net ->
            val report = Engine(net, program.spec()).benchmark(photos, Plan(warmup = 2, runs = 3))
            assertEquals(4, report.results.size)
            assertTrue(report.run.median > 0 && report.run.low <= report.run.high)
        }
    }

    @Test
    fun aDamagedDelegateIsARefusal() {
        val copy = File.createTempFile("damaged", ".pte")
        File(folder, "int8.pte").copyTo(copy, overwrite = true)
        val program = Program.read(ByteBuffer.wrap(copy.readBytes()))
        RandomAccessFile(copy, "rw").use { file ->
            val whole = copy.readBytes()
            val at = String(whole, Charsets.ISO_8859_1).indexOf("XH00")
            file.seek(at.toLong())
            file.write(ByteArray(16))
        }
        assertFailsWith<Refusal> { ModuleNet.open(copy.path, program).close() }
        copy.delete()
    }
}
