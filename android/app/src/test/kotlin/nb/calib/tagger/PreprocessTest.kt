package nb.calib.tagger

import java.io.File
import java.nio.ByteBuffer
import java.nio.ByteOrder
import kotlin.test.Test
import kotlin.test.assertEquals
import kotlin.test.assertTrue

/** Vectors that Python wrote, in the folder of the property "vectors": pixels as stored, and the network's input. */
class PreprocessTest {
    private val folder = File(System.getProperty("vectors"))
    private fun number(case: Map<*, *>, key: String) = case[key] as Double

    private fun stored(case: Map<*, *>): Pixels {
        val rgb = File(folder, case["pixels"] as String).readBytes()
        val argb = IntArray(rgb.size / 3) {
            (255 shl 24) or ((rgb[3 * it].toInt() and 255) shl 16) or ((rgb[3 * it + 1].toInt() and 255) shl 8) or (rgb[3 * it + 2].toInt() and 255)
        }
        return Pixels(number(case, "width").toInt(), number(case, "height").toInt(), argb)
    }

    @Test
    fun theInputIsThatOfThePythonChain() {
        val cases = Json.read(File(folder, "index.json").readText()) as List<*>
        var worst = 0f
        for (case in cases.map { it as Map<*, *> }) {
            val jpeg = (case["jpeg"] as String?)?.let { File(folder, it).readBytes() }
            val orientation = jpeg?.let { Exif.orientation(it) } ?: 1
            if (case["orientation"] != null) assertEquals(number(case, "orientation").toInt(), orientation, case["pixels"] as String)
            val image = Exif.upright(stored(case), orientation)
            val tensor = Preprocess(number(case, "size").toInt(), number(case, "crop")).tensor(image)
            val wanted = ByteBuffer.wrap(File(folder, case["expected"] as String).readBytes()).order(ByteOrder.LITTLE_ENDIAN).asFloatBuffer()
            assertEquals(wanted.remaining(), tensor.size)
            for (k in tensor.indices) worst = maxOf(worst, Math.abs(tensor[k] - wanted.get(k)))
            assertTrue(worst <= 1e-6f, "${case["pixels"]}: $worst")
        }
        println("parity: ${cases.size} cases, largest difference $worst")
    }

    @Test
    fun brokenExifIsUpright() {
        val jpeg = File(folder, "exif6.jpg").readBytes()
        assertEquals(6, Exif.orientation(jpeg))
        for (length in 0 until minOf(jpeg.size, 200)) assertTrue(Exif.orientation(jpeg.copyOf(length)) in 1..8)
        assertEquals(1, Exif.orientation(byteArrayOf(1, 2, 3, 4, 5)))
    }
}
